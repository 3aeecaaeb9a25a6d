//! `sterna cancel`

use proto::agent as pb;

use crate::Failed;
use crate::arguments::{Arguments, Cancel};
use crate::client::{connect, refused};
use crate::exit::Exit;

pub(crate) async fn run(arguments: &Arguments, command: &Cancel) -> Result<Exit, Failed> {
    let request = pb::CancelRequest {
        container: Some(arguments.container(&command.name)),
    };
    let response = connect(arguments)
        .await?
        .cancel(request)
        .await
        .map_err(refused)?
        .into_inner();
    println!(
        "cancelled migration {}: {} stays here",
        response.migration_id, command.name
    );
    Ok(Exit::Success)
}
