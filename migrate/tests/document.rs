//! `docs/protocol.md` says what the code does.

use std::time::Duration;

use sterna_migrate::Phase;

const DOCUMENT: &str = include_str!("../../docs/protocol.md");

/// The first drawing in a module's documentation.
fn drawing(module: &str) -> String {
    module
        .lines()
        .skip_while(|line| *line != "//! ```text")
        .skip(1)
        .take_while(|line| *line != "//! ```")
        .map(|line| line.strip_prefix("//! ").unwrap_or_default())
        .collect::<Vec<_>>()
        .join("\n")
}

#[test]
fn the_document_shows_the_drawings_of_both_modules() {
    for module in [
        include_str!("../src/source.rs"),
        include_str!("../src/destination.rs"),
    ] {
        let drawing = drawing(module);
        assert!(drawing.lines().count() > 10);
        assert!(
            DOCUMENT.contains(&drawing),
            "not in the document:\n{drawing}"
        );
    }
}

#[test]
fn the_document_states_the_timeout_of_every_phase() {
    for phase in Phase::ALL {
        let row = DOCUMENT
            .lines()
            .find(|line| line.starts_with(&format!("| {phase} |")))
            .unwrap_or_else(|| panic!("no row for {phase}"));
        let timeout = match phase.timeout() {
            hour if hour == Duration::from_secs(3600) => "1 h".to_string(),
            other => format!("{} s", other.as_secs()),
        };
        assert!(row.contains(&format!("| {timeout}")), "{phase}: {row}");
    }
}
