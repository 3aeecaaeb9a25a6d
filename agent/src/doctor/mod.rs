//! Can this node, this pair, this container do it? Nothing is touched.

mod container;
mod machine;
mod processes;

use identity::NodeName;
use proto::agent as pb;
use proto::agent::Severity;
use std::time::Duration;
use tonic::Status;

use crate::arrivals::{admission, internal, plan};
use crate::departures::{Described, Stop, check_movable_now, describe, find_record};
use crate::facts;
use crate::node::Node;
use crate::peer::{Peer, resolve, within};

/// The other node runs its self-test.
const CHECK_TIMEOUT: Duration = Duration::from_secs(30);

/// Findings of one scope, as they come.
#[derive(Debug)]
struct Findings {
    scope: String,
    list: Vec<pb::Finding>,
}

impl Findings {
    fn new(scope: String) -> Self {
        Self {
            scope,
            list: Vec::new(),
        }
    }

    fn add(&mut self, severity: Severity, subject: &str, text: impl Into<String>) {
        self.list.push(pb::Finding {
            severity: severity.into(),
            scope: self.scope.clone(),
            subject: subject.into(),
            text: text.into(),
        });
    }

    fn ok(&mut self, subject: &str, text: impl Into<String>) {
        self.add(Severity::Ok, subject, text);
    }

    fn warning(&mut self, subject: &str, text: impl Into<String>) {
        self.add(Severity::Warning, subject, text);
    }

    fn problem(&mut self, subject: &str, text: impl Into<String>) {
        self.add(Severity::Problem, subject, text);
    }
}

/// Everything that the question is about: the node always, the pair and the
/// container if they are named.
pub(crate) async fn examine(
    node: &Node,
    request: pb::DoctorRequest,
) -> Result<Vec<pb::Finding>, Status> {
    let peer: Option<NodeName> = match request.node.as_str() {
        "" => None,
        name => Some(name.parse().map_err(|error: identity::InvalidNodeName| {
            Status::invalid_argument(error.to_string())
        })?),
    };
    let record = match request.container {
        Some(name) if !name.id.is_empty() => Some(find_record(node, &name)?),
        _ => None,
    };
    let mut all = machine::examine(node).await;
    let mut described = None;
    if let Some(record) = &record {
        let mut findings = Findings::new(format!("container {}/{}", record.namespace, record.id));
        if let Err(status) = check_movable_now(record) {
            findings.problem("state", status.message());
        }
        described = take_description(describe(node, record, None).await, &mut findings);
        if let Some(described) = &described {
            container::examine(described, &mut findings);
        }
        all.extend(findings.list);
    }
    if let Some(peer) = peer {
        all.extend(pair(node, &peer, described.as_ref()).await?);
    }
    Ok(all)
}

/// What would make the dump of a container fail: better known while it runs than
/// found out while it stands still.
pub(crate) fn obstacles(described: &Described) -> Vec<pb::Reason> {
    let mut findings = Findings::new(String::new());
    container::examine(described, &mut findings);
    findings
        .list
        .into_iter()
        .filter(|finding| finding.severity() == Severity::Problem)
        .map(|finding| pb::Reason {
            subject: finding.subject,
            text: finding.text,
        })
        .collect()
}

fn take_description(result: Result<Described, Stop>, findings: &mut Findings) -> Option<Described> {
    match result {
        Ok(described) => Some(described),
        Err(Stop::Refused(reasons)) => {
            for reason in reasons {
                findings.problem(&reason.subject, reason.text);
            }
            None
        }
        Err(Stop::Failed(failure)) => {
            findings.problem("description", failure.to_string());
            None
        }
    }
}

async fn pair(
    node: &Node,
    name: &NodeName,
    described: Option<&Described>,
) -> Result<Vec<pb::Finding>, Status> {
    let mut findings = Findings::new(format!("pair {} to {name}", node.name));
    if let Err(text) = resolve(node, name).await {
        findings.problem("node", text);
        return Ok(findings.list);
    }
    let peer = match Peer::connect(node, name).await {
        Ok(peer) => peer,
        Err(failure) => {
            findings.problem("connection", failure.to_string());
            return Ok(findings.list);
        }
    };
    findings.ok(
        "connection",
        format!("{} answers as node {name}", peer.address()),
    );

    let ours = facts::gather(node).await.map_err(internal)?;
    let json = |value: &dyn erased::Json| value.json().map_err(|error| internal(error.into()));
    let request = pb::CheckRequest {
        facts_json: json(&ours)?.into(),
        needs_json: match described {
            Some(described) => json(&described.needs)?.into(),
            None => Default::default(),
        },
    };
    match peer.client().check(within(CHECK_TIMEOUT, request)).await {
        Ok(response) => {
            let refusals = response.into_inner().refusals;
            if refusals.is_empty() {
                let what = if described.is_some() {
                    "the container"
                } else {
                    "containers"
                };
                findings.ok("negotiation", format!("node {name} would take {what}"));
            }
            for refusal in refusals {
                findings.problem(&refusal.subject, refusal.text);
            }
        }
        Err(status) => {
            findings.problem(
                "negotiation",
                peer.explain("negotiate", &status).await.to_string(),
            );
        }
    }
    way_back(node, &peer, &mut findings).await;
    Ok(findings.list)
}

/// Whether a container could come back: a pair that works in one direction only
/// is better known before the first journey.
async fn way_back(node: &Node, peer: &Peer, findings: &mut Findings) {
    let answer = match peer
        .client()
        .facts(within(CHECK_TIMEOUT, pb::FactsRequest {}))
        .await
    {
        Ok(response) => response.into_inner(),
        Err(status) => {
            findings.warning(
                "way back",
                peer.explain("tell its facts", &status).await.to_string(),
            );
            return;
        }
    };
    let refusals = async {
        let theirs = plan::json("facts", &answer.facts_json)?;
        let theirs = theirs.ok_or_else(|| anyhow::anyhow!("the node tells no facts"))?;
        admission::negotiate(node, &theirs, None).await
    };
    match refusals.await {
        Ok(refusals) if refusals.is_empty() => {
            findings.ok("way back", "containers could come back");
        }
        Ok(refusals) => {
            for refusal in refusals {
                findings.warning("way back", refusal.text);
            }
        }
        Err(error) => findings.warning("way back", format!("{error:#}")),
    }
}

/// Different types, one closure.
mod erased {
    pub(super) trait Json {
        fn json(&self) -> serde_json::Result<Vec<u8>>;
    }

    impl<T: serde::Serialize> Json for T {
        fn json(&self) -> serde_json::Result<Vec<u8>> {
            serde_json::to_vec(self)
        }
    }
}
