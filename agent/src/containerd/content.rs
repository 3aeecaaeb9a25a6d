//! The content store.

use std::collections::HashMap;

use containerd_client::services::v1::{
    AbortRequest, Info, InfoRequest, ReadContentRequest, ReadContentResponse, UpdateRequest,
    WriteAction, WriteContentRequest, WriteContentResponse,
};
use prost_types::FieldMask;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming};

use super::{CallError, Namespace, QUICK, failed, found, gone};

/// Manifests and configurations are read into memory; the largest in the wild are
/// below a megabyte. (containerd's own limit for them is 8 MiB.)
const DOCUMENT_LIMIT_BYTES: u64 = 8 << 20;

impl Namespace {
    /// Size of a blob, if the store has it.
    pub(crate) async fn blob_size(&self, digest: &str) -> Result<Option<u64>, CallError> {
        let request = InfoRequest {
            digest: digest.to_owned(),
        };
        let answer = self
            .client()
            .content()
            .info(self.request(request, QUICK))
            .await
            .map_err(failed(|| format!("look up blob {digest}")));
        let info = found(answer)?.and_then(|response| response.into_inner().info);
        Ok(info.map(|info| u64::try_from(info.size).unwrap_or(0)))
    }

    /// Sets single labels of a blob; others stay.
    pub(crate) async fn label_blob(
        &self,
        digest: &str,
        labels: HashMap<String, String>,
    ) -> Result<(), CallError> {
        let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
        let request = UpdateRequest {
            info: Some(Info {
                digest: digest.to_owned(),
                labels,
                ..Default::default()
            }),
            update_mask: Some(FieldMask { paths }),
        };
        self.client()
            .content()
            .update(self.request(request, QUICK))
            .await
            .map(drop)
            .map_err(failed(|| format!("label blob {digest}")))
    }

    /// A blob in pieces.
    pub(crate) async fn read_blob(
        &self,
        digest: &str,
    ) -> Result<Streaming<ReadContentResponse>, CallError> {
        let request = ReadContentRequest {
            digest: digest.to_owned(),
            offset: 0,
            size: 0,
        };
        self.client()
            .content()
            .read(self.untimed(request))
            .await
            .map(tonic::Response::into_inner)
            .map_err(failed(|| format!("read blob {digest}")))
    }

    /// A small blob as a whole, if the store has it.
    pub(crate) async fn document(&self, digest: &str) -> anyhow::Result<Option<Vec<u8>>> {
        let Some(size) = self.blob_size(digest).await? else {
            return Ok(None);
        };
        anyhow::ensure!(
            size <= DOCUMENT_LIMIT_BYTES,
            "blob {digest} has {size} bytes: too many for a manifest or configuration"
        );
        let mut pieces = self.read_blob(digest).await?;
        let mut document = Vec::new();
        while let Some(piece) = next_piece(&mut pieces, digest).await? {
            document.extend_from_slice(&piece);
        }
        Ok(Some(document))
    }

    /// Discards what an attempt to write a blob left behind.
    pub(crate) async fn discard_blob(&self, owner: &str, digest: &str) -> Result<(), CallError> {
        let request = AbortRequest {
            r#ref: reference(owner, digest),
        };
        gone(
            self.client()
                .content()
                .abort(self.request(request, QUICK))
                .await
                .map_err(failed(|| format!("discard a part of blob {digest}"))),
        )
    }

    /// Begins to write a blob for `owner`. `None`: the store has it already.
    pub(crate) async fn write_blob(
        &self,
        owner: &str,
        digest: &str,
        size: u64,
    ) -> Result<Option<BlobWriter>, CallError> {
        // What an earlier attempt left would be continued, at an offset of its own.
        self.discard_blob(owner, digest).await?;
        let reference = reference(owner, digest);
        let (requests, queue) = mpsc::channel(2);
        let mut writer = BlobWriter {
            requests,
            responses: None,
            digest: digest.to_owned(),
            reference,
            size: i64::try_from(size).unwrap_or(i64::MAX),
            offset: 0,
        };
        let first = writer.message(WriteAction::Stat, Vec::new());
        // The receiver is alive: it is in this function.
        drop(writer.requests.send(first).await);
        let opened = self
            .client()
            .content()
            .write(self.untimed(ReceiverStream::new(queue)))
            .await;
        let mut responses = match opened {
            Ok(response) => response.into_inner(),
            Err(status) if status.code() == Code::AlreadyExists => return Ok(None),
            Err(status) => return Err(failed(|| format!("write blob {digest}"))(status)),
        };
        match responses.message().await {
            Ok(_) => {}
            Err(status) if status.code() == Code::AlreadyExists => return Ok(None),
            Err(status) => return Err(failed(|| format!("write blob {digest}"))(status)),
        }
        writer.responses = Some(responses);
        Ok(Some(writer))
    }
}

/// Name of a blob that is being written: two migrations may bring the same one.
fn reference(owner: &str, digest: &str) -> String {
    format!("sterna-{owner}-{digest}")
}

/// The next piece of a blob that is being read.
pub(crate) async fn next_piece(
    pieces: &mut Streaming<ReadContentResponse>,
    digest: &str,
) -> Result<Option<Vec<u8>>, CallError> {
    let piece = pieces
        .message()
        .await
        .map_err(failed(|| format!("read blob {digest}")))?;
    Ok(piece.map(|piece| piece.data))
}

/// A blob on its way into the store. containerd checks the digest at the end;
/// one that is dropped before is discarded with the next attempt or the lease.
#[derive(Debug)]
pub(crate) struct BlobWriter {
    requests: mpsc::Sender<WriteContentRequest>,
    responses: Option<Streaming<WriteContentResponse>>,
    digest: String,
    reference: String,
    size: i64,
    offset: i64,
}

impl BlobWriter {
    fn message(&self, action: WriteAction, data: Vec<u8>) -> WriteContentRequest {
        WriteContentRequest {
            action: action.into(),
            r#ref: self.reference.clone(),
            total: self.size,
            expected: self.digest.clone(),
            offset: self.offset,
            data,
            labels: HashMap::new(),
        }
    }

    /// One round: containerd answers every message.
    async fn call(&mut self, request: WriteContentRequest) -> Result<(), tonic::Status> {
        let ended = || tonic::Status::aborted("the write ended early");
        // A closed queue: the reason comes as the next response.
        drop(self.requests.send(request).await);
        let responses = self.responses.as_mut().ok_or_else(ended)?;
        let response = responses.message().await?.ok_or_else(ended)?;
        self.offset = response.offset;
        Ok(())
    }

    /// Appends `data`.
    pub(crate) async fn write(&mut self, data: Vec<u8>) -> Result<(), CallError> {
        let request = self.message(WriteAction::Write, data);
        self.call(request)
            .await
            .map_err(failed(|| format!("write blob {}", self.digest)))
    }

    /// Makes the blob part of the store, if it has the digest.
    pub(crate) async fn commit(mut self) -> Result<(), CallError> {
        let request = self.message(WriteAction::Commit, Vec::new());
        match self.call(request).await {
            Err(status) if status.code() == Code::AlreadyExists => Ok(()),
            other => other.map_err(failed(|| format!("commit blob {}", self.digest))),
        }
    }
}
