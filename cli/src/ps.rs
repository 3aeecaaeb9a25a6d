//! `sterna ps`

use std::io::{self, Write as _};

use anyhow::Context as _;
use proto::agent as pb;
use serde::Serialize;

use crate::Failed;
use crate::arguments::{Arguments, Ps};
use crate::client::{connect, refused};
use crate::exit::Exit;
use crate::format::table;

#[derive(Serialize)]
struct Container<'a> {
    node: &'a str,
    namespace: &'a str,
    id: &'a str,
    state: &'a str,
    pid: u32,
    shim_pid: u32,
    /// The other node of a migration.
    #[serde(skip_serializing_if = "str::is_empty")]
    peer: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    migration_id: &'a str,
}

pub(crate) async fn run(arguments: &Arguments, command: &Ps) -> Result<Exit, Failed> {
    let request = pb::ListRequest {
        namespace: arguments.namespace.clone().unwrap_or_default(),
    };
    let response = connect(arguments)
        .await?
        .list(request)
        .await
        .map_err(refused)?
        .into_inner();
    let mut out = io::stdout().lock();
    let shown = if command.json {
        serde_json::to_writer_pretty(&mut out, &objects(&response))
            .map_err(io::Error::from)
            .and_then(|()| writeln!(out))
    } else {
        table(
            &mut out,
            ["NAMESPACE", "CONTAINER", "STATE", "PID", "PEER"],
            &rows(&response),
        )
    };
    shown.context("cannot write the list")?;
    Ok(Exit::Success)
}

fn objects(response: &pb::ListResponse) -> Vec<Container<'_>> {
    response
        .containers
        .iter()
        .map(|container| Container {
            node: &response.node,
            namespace: &container.namespace,
            id: &container.id,
            state: &container.state,
            pid: container.pid,
            shim_pid: container.shim_pid,
            peer: &container.peer,
            migration_id: &container.migration_id,
        })
        .collect()
}

fn rows(response: &pb::ListResponse) -> Vec<[String; 5]> {
    response
        .containers
        .iter()
        .map(|container| {
            let peer = match (container.peer.as_str(), container.state.as_str()) {
                ("", _) => String::new(),
                (peer, "receiving" | "settling") => format!("from {peer}"),
                (peer, _) => format!("to {peer}"),
            };
            [
                container.namespace.clone(),
                container.id.clone(),
                container.state.clone(),
                container.pid.to_string(),
                peer,
            ]
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response() -> pb::ListResponse {
        pb::ListResponse {
            node: "a".into(),
            containers: vec![pb::ContainerStatus {
                namespace: "default".into(),
                id: "web".into(),
                state: "sending".into(),
                pid: 7,
                shim_pid: 6,
                peer: "b".into(),
                migration_id: String::new(),
            }],
        }
    }

    #[test]
    fn a_container_on_its_way_shows_where_to() {
        assert_eq!(
            rows(&response())[0],
            ["default", "web", "sending", "7", "to b"].map(String::from)
        );
    }

    #[test]
    fn json_leaves_out_what_is_not_there() {
        let value = serde_json::to_value(objects(&response())).unwrap();
        assert_eq!(value[0]["node"], "a");
        assert_eq!(value[0]["peer"], "b");
        assert!(value[0].get("migration_id").is_none());
    }
}
