//! `sterna doctor`

use std::io::{self, Write};

use anyhow::Context as _;
use proto::agent::{self as pb, Severity};
use serde::Serialize;

use crate::Failed;
use crate::arguments::{Arguments, Doctor};
use crate::client::{connect, refused};
use crate::exit::Exit;

#[derive(Serialize)]
struct Report<'a> {
    /// No problem was found.
    ok: bool,
    findings: Vec<Finding<'a>>,
}

#[derive(Serialize)]
struct Finding<'a> {
    severity: &'a str,
    scope: &'a str,
    subject: &'a str,
    text: &'a str,
}

pub(crate) async fn run(arguments: &Arguments, command: &Doctor) -> Result<Exit, Failed> {
    let request = pb::DoctorRequest {
        node: command.to.clone().unwrap_or_default(),
        container: command.name.as_ref().map(|name| arguments.container(name)),
    };
    let response = connect(arguments)
        .await?
        .doctor(request)
        .await
        .map_err(refused)?
        .into_inner();
    let findings = &response.findings;
    let ok = !findings
        .iter()
        .any(|finding| finding.severity() == Severity::Problem);
    let mut out = io::stdout().lock();
    let shown = if command.json {
        serde_json::to_writer_pretty(&mut out, &report(ok, findings))
            .map_err(io::Error::from)
            .and_then(|()| writeln!(out))
    } else {
        text(&mut out, findings)
    };
    shown.context("cannot write the report")?;
    Ok(if ok { Exit::Success } else { Exit::Failed })
}

fn word(severity: Severity) -> &'static str {
    match severity {
        Severity::Ok => "ok",
        Severity::Warning => "warning",
        // A word that this version does not know is not taken lightly.
        Severity::Problem | Severity::Unspecified => "problem",
    }
}

fn report(ok: bool, findings: &[pb::Finding]) -> Report<'_> {
    let findings = findings.iter().map(|finding| Finding {
        severity: word(finding.severity()),
        scope: &finding.scope,
        subject: &finding.subject,
        text: &finding.text,
    });
    Report {
        ok,
        findings: findings.collect(),
    }
}

/// Findings under the heading of their scope, in the order in which they came.
fn text(out: &mut impl Write, findings: &[pb::Finding]) -> io::Result<()> {
    let mut scope = "";
    for finding in findings {
        if finding.scope != scope {
            scope = &finding.scope;
            writeln!(out, "{scope}")?;
        }
        writeln!(
            out,
            "  {:8} {}: {}",
            word(finding.severity()),
            finding.subject,
            finding.text
        )?;
    }
    let count = |severity, what| {
        let found = findings.iter().filter(|f| f.severity() == severity).count();
        match found {
            0 => format!("no {what}s"),
            1 => format!("1 {what}"),
            _ => format!("{found} {what}s"),
        }
    };
    let problems = count(Severity::Problem, "problem");
    let warnings = count(Severity::Warning, "warning");
    writeln!(out, "{problems}, {warnings}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(severity: Severity, scope: &str) -> pb::Finding {
        pb::Finding {
            severity: severity.into(),
            scope: scope.into(),
            subject: "criu".into(),
            text: "criu 4.2.1".into(),
        }
    }

    #[test]
    fn findings_stand_under_their_scope_and_are_counted() {
        let findings = [
            finding(Severity::Ok, "node a"),
            finding(Severity::Problem, "node a"),
            finding(Severity::Warning, "pair a to b"),
        ];
        let mut out = Vec::new();
        text(&mut out, &findings).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert_eq!(
            text,
            "node a\n  ok       criu: criu 4.2.1\n  problem  criu: criu 4.2.1\n\
             pair a to b\n  warning  criu: criu 4.2.1\n1 problem, 1 warning\n"
        );
        let json = serde_json::to_value(report(false, &findings)).unwrap();
        assert_eq!(json["ok"], false);
        assert_eq!(json["findings"][1]["severity"], "problem");
    }
}
