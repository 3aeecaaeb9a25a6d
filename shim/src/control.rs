//! What sternad asks of a shim: `sterna.shim.v1`.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use proto::shim::control::{SendRequest, SendResponse};
use proto::shim::control_ttrpc::{Control, create_control};
use ttrpc::r#async::{Service, TtrpcContext};

use crate::error::{Error, Result};
use crate::migrate_out;
use crate::pod::Pod;

#[derive(Debug)]
struct ControlService(Arc<Pod>);

/// The service for `Server::register_service`.
pub(crate) fn services(pod: &Arc<Pod>) -> HashMap<String, Service> {
    create_control(Arc::new(ControlService(Arc::clone(pod))))
}

#[async_trait]
impl Control for ControlService {
    async fn send(&self, _: &TtrpcContext, request: SendRequest) -> ttrpc::Result<SendResponse> {
        tracing::info!(
            id = request.container_id,
            migration = request.migration_id,
            peer = request.peer_node,
            "send"
        );
        check(&request)?;
        let container = self.0.container(&request.container_id)?;
        let engine_socket = self
            .0
            .context
            .run_dir
            .engine_socket(&request.migration_id)
            .display()
            .to_string();
        // As in the task service: not undone by a deadline.
        tokio::spawn(async move { migrate_out::send(&container, request).await })
            .await
            .unwrap_or_else(|error| Err(Error::Interrupted(error)))?;
        Ok(SendResponse {
            engine_socket,
            ..Default::default()
        })
    }
}

/// The id becomes part of file names.
fn check(request: &SendRequest) -> Result<()> {
    let id = &request.migration_id;
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
    if id.is_empty() || id.len() > 64 || !id.chars().all(plain) {
        return Err(Error::InvalidArgument {
            what: format!("migration id {id:?}"),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_migration_id_that_could_leave_its_directory_is_refused() {
        let request = |id: &str| SendRequest {
            migration_id: id.into(),
            ..Default::default()
        };
        assert!(check(&request("0af3-22")).is_ok());
        for id in ["", "../x", "a/b", "a.b", &"x".repeat(65)] {
            assert!(check(&request(id)).is_err(), "{id}");
        }
    }
}
