//! `sterna release`

use proto::agent as pb;

use crate::Failed;
use crate::arguments::{Arguments, Release};
use crate::client::{connect, refused};
use crate::exit::Exit;

pub(crate) async fn run(arguments: &Arguments, command: &Release) -> Result<Exit, Failed> {
    let (verdict, what) = match command.verdict.handed_back {
        true => (pb::Verdict::HandedBack, "goes on here"),
        false => (pb::Verdict::Gone, "is ended here"),
    };
    let request = pb::ReleaseRequest {
        container: Some(arguments.container(&command.name)),
        verdict: verdict.into(),
    };
    let response = connect(arguments)
        .await?
        .release(request)
        .await
        .map_err(refused)?
        .into_inner();
    println!(
        "released migration {} to {}: {} {what}",
        response.migration_id, response.peer, command.name
    );
    Ok(Exit::Success)
}
