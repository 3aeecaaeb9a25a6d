//! A client that writes to a Valkey and can say afterwards what was lost.

use std::time::Duration;

use serde::Deserialize;

use crate::lab::Lab;
use crate::node::Background;

/// Filling and reading back, for the amounts that tests use.
const PATIENCE: Duration = Duration::from_secs(120);

/// sterna-load at work. Its connections are open from the beginning.
#[derive(Debug)]
pub struct Load(Background);

/// What a client saw since the last look.
#[derive(Debug, Clone, Deserialize)]
pub struct Mark {
    /// Longest time between two answers to the probe, in milliseconds.
    pub blackout_ms: f64,
    /// Writes answered since the beginning.
    pub writes_acknowledged: u64,
}

/// What became of the data.
#[derive(Debug, Clone, Deserialize)]
pub struct Verdict {
    /// The digest over all keys and values is what it must be.
    pub digest_equal: bool,
    /// Writes answered.
    pub writes_acknowledged: u64,
    /// Answered writes that are not there.
    pub writes_lost: u64,
    /// Connections that ended before their time.
    pub connections_dropped: usize,
}

impl Load {
    /// Fills the server and begins to write; returns when the load is steady.
    #[track_caller]
    pub fn start(lab: &Lab, address: &str, memory: &str, rate: &str) -> Self {
        let address = format!("{address}:6379");
        crate::eventually(&format!("{address} accepts connections"), || {
            std::net::TcpStream::connect(&address).ok()
        });
        let mut command = std::process::Command::new(lab.program("sterna-load"));
        command.args(["run", "--address", &address]);
        command.args(["--memory", memory, "--write-rate", rate, "--writers", "2"]);
        let mut load = Self(Background::start(command));
        load.event("ready");
        load
    }

    #[track_caller]
    fn event(&mut self, name: &str) -> serde_json::Value {
        let is_wanted = |line: &str| {
            serde_json::from_str::<serde_json::Value>(line)
                .is_ok_and(|event| event["event"] == name)
        };
        let line = self.0.line(PATIENCE, is_wanted);
        let line = line.unwrap_or_else(|| panic!("the client ended before it said {name}"));
        serde_json::from_str(&line).expect("it was parsed a moment ago")
    }

    /// What happened since the last look.
    #[track_caller]
    pub fn mark(&mut self) -> Mark {
        self.0.say("mark");
        serde_json::from_value(self.event("mark")).expect("sterna-load and the tests agree")
    }

    /// Fails unless writes are being answered right now.
    #[track_caller]
    pub fn assert_served(&mut self) {
        let before = self.mark().writes_acknowledged;
        crate::eventually("the server answers writes", || {
            (self.mark().writes_acknowledged > before).then_some(())
        });
    }

    /// Stops and reads everything back.
    #[track_caller]
    pub fn stop(mut self) -> Verdict {
        self.0.say("stop");
        let result = self.event("result");
        serde_json::from_value(result).expect("sterna-load and the tests agree")
    }
}

impl Verdict {
    /// Fails unless every answered write is there and every connection lived.
    #[track_caller]
    pub fn assert_nothing_lost(&self) {
        assert!(
            self.writes_acknowledged > 0,
            "nothing was written: {self:?}"
        );
        assert!(
            self.digest_equal,
            "the data is not what it must be: {self:?}"
        );
        assert_eq!(
            (self.writes_lost, self.connections_dropped),
            (0, 0),
            "{self:?}"
        );
    }
}
