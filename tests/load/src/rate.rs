//! Amounts and rates as people write them.

use std::str::FromStr;

use anyhow::{Context, bail};

/// A number of bytes: 4096, 64M, 1G.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bytes(pub(crate) u64);

impl FromStr for Bytes {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (digits, unit) = text.split_at(
            text.find(|c: char| !c.is_ascii_digit())
                .unwrap_or(text.len()),
        );
        let number: u64 = digits
            .parse()
            .with_context(|| format!("{text} is not an amount"))?;
        let factor = match unit {
            "" | "B" => 1,
            "K" | "KiB" => 1 << 10,
            "M" | "MiB" => 1 << 20,
            "G" | "GiB" => 1 << 30,
            _ => bail!("{unit} is not a unit: use K, M or G"),
        };
        number
            .checked_mul(factor)
            .map(Self)
            .with_context(|| format!("{text} is too much"))
    }
}

/// How much to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rate {
    /// Writes per second.
    Writes(u64),
    /// Bytes of values per second.
    Bytes(u64),
    /// As much as the server takes.
    Max,
}

impl Rate {
    /// Writes per second at this size of values; none: no limit.
    pub(crate) fn writes_per_second(self, value_size: usize) -> Option<f64> {
        match self {
            Self::Writes(writes) => Some(writes as f64),
            Self::Bytes(bytes) => Some(bytes as f64 / value_size as f64),
            Self::Max => None,
        }
    }
}

impl FromStr for Rate {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "max" {
            return Ok(Self::Max);
        }
        let amount = text
            .strip_suffix("/s")
            .context("a rate is written 20000/s, 50M/s or max")?;
        let bytes: Bytes = amount.parse()?;
        if amount.ends_with(|c: char| c.is_ascii_digit()) {
            Ok(Self::Writes(bytes.0))
        } else {
            Ok(Self::Bytes(bytes.0))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_and_rates_are_read_as_people_write_them() {
        assert_eq!("64M".parse::<Bytes>().unwrap(), Bytes(64 << 20));
        assert_eq!("20000/s".parse::<Rate>().unwrap(), Rate::Writes(20_000));
        assert_eq!("50M/s".parse::<Rate>().unwrap(), Rate::Bytes(50 << 20));
        assert_eq!("max".parse::<Rate>().unwrap(), Rate::Max);
        for wrong in ["fast", "20000", "3X/s", "/s"] {
            assert!(wrong.parse::<Rate>().is_err(), "{wrong}");
        }
    }
}
