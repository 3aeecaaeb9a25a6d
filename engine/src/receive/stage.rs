//! Everything that is ready before the commit: runc and CRIU at the gate, the root
//! file system, and the check that all of it is here.

use std::fs;
use std::io;
use std::path::Path;

use migrate::Phase;
use nodeapi::{FromEngine, RestoreFlags, RestoreOrder, ToEngine};
use pages::SpaceId;
use proto::migration as pb;

use super::{Receiver, guarded};
use crate::gate::{self, Gate};
use crate::receive_error::ReceiveError;
use crate::tmpfs::Programs;

/// Most address spaces in one container's account.
const MAX_SPACES: usize = 65_536;
/// Most ranges over all of them.
const MAX_RANGES: usize = 1 << 20;

impl Receiver {
    /// Has the shim start runc and CRIU; they stand still at the gate when this
    /// returns. What cannot be restored for their sake shows here, while the
    /// container still runs on the source.
    pub(super) async fn start_restore(&mut self, flags: RestoreFlags) -> Result<(), ReceiveError> {
        let directory = self.images.with_file_name("programs");
        self.programs = Programs::make(directory.clone()).map_err(|source| ReceiveError::File {
            action: "make",
            path: directory,
            source,
        })?;
        let gate = Gate::make(&self.images).map_err(self.at_gate("make"))?;
        let failed = self.at_gate("watch");
        let gate = self.gate.insert(gate);
        self.shim.send(&FromEngine::PrepareRestore(RestoreOrder {
            images: self.images.clone(),
            work_dir: self.work_dir.clone(),
            programs: self
                .programs
                .as_ref()
                .map(|programs| programs.directory().to_owned()),
            lazy_pages: true,
            flags,
        }))?;
        let reached = async { gate.reached().await.map_err(failed) };
        let (messages, arrived) = (&mut self.messages, &mut self.arrived);
        let limit = Phase::Prepare.timeout();
        guarded(messages, arrived, limit, "get CRIU ready", reached).await
    }

    /// Has the shim mount the files that have arrived.
    pub(super) async fn mount_root(&mut self) -> Result<(), ReceiveError> {
        self.shim.send(&FromEngine::FilesComplete)?;
        let limit = Phase::Freeze.timeout();
        match tokio::time::timeout(limit, self.messages.recv()).await {
            Ok(Some(ToEngine::RootMounted)) => Ok(()),
            Ok(message) => Err(ReceiveError::spoken(message)),
            Err(_) => Err(ReceiveError::Timeout {
                what: "mount its root file system",
                limit,
            }),
        }
    }

    pub(super) fn at_gate(
        &self,
        action: &'static str,
    ) -> impl FnOnce(io::Error) -> ReceiveError + use<> {
        let path = self.images.join(gate::INVENTORY);
        move |source| ReceiveError::File {
            action,
            path,
            source,
        }
    }

    /// Waits for everything in the account and compares it with what is here.
    pub(super) async fn check(
        &mut self,
        account: &pb::Final,
    ) -> Result<pb::Prepared, ReceiveError> {
        let mut arrived = self.arrived.clone();
        let complete = async {
            arrived
                .wait_for(|arrived| arrived.covers(account))
                .await
                .map(|_| ())
                .map_err(|_| ReceiveError::SourceLost("the server ended".into()))
        };
        let limit = Phase::Freeze.timeout();
        guarded(
            &mut self.messages,
            &mut self.arrived,
            limit,
            "send all it counted",
            complete,
        )
        .await?;
        if account.spaces.len() > MAX_SPACES
            || account
                .spaces
                .iter()
                .map(|space| space.ranges.len())
                .sum::<usize>()
                > MAX_RANGES
        {
            return Err(ReceiveError::Damaged(
                "the account names too many ranges".into(),
            ));
        }
        // Of processes that ended before the freeze.
        let listed: Vec<_> = account
            .spaces
            .iter()
            .map(|space| SpaceId(space.space))
            .collect();
        self.staging.retain_spaces(&listed);
        for space in &account.spaces {
            let ranges: Vec<_> = space
                .ranges
                .iter()
                .map(|range| range.start..range.end)
                .collect();
            self.staging
                .retain(SpaceId(space.space), &ranges)
                .map_err(|error| ReceiveError::Damaged(error.to_string()))?;
        }
        let images = self.arriving.clone();
        let hostname = self.hostname.clone();
        let dumped = tokio::task::spawn_blocking(move || {
            criu::images::clear_lazy(&images)?;
            if let Some(name) = hostname {
                criu::images::set_hostname(&images, &name)?;
            }
            criu::images::dumped_pages(&images)
        })
        .await
        .map_err(|error| ReceiveError::Damaged(error.to_string()))?
        .map_err(ReceiveError::Images)?;
        // CRIU restores these itself; a page that is there already would look like
        // one that came into being by mistake.
        for pages in &dumped {
            self.staging
                .remove(SpaceId(pages.pid), &pages.ranges)
                .map_err(|error| ReceiveError::Damaged(error.to_string()))?;
        }
        let inventory = take_images(&self.arriving, &self.images)?;
        let failed = self.at_gate("close");
        if let Some(gate) = &mut self.gate {
            gate.hold(inventory).map_err(failed)?;
        }
        let usage = self.staging.usage();
        Ok(pb::Prepared {
            staged_pages: usage.pages,
            staged_bytes: usage.bytes,
        })
    }
}

/// Puts CRIU's images where it looks for them, all but the one that it waits for,
/// whose content is returned.
fn take_images(arriving: &Path, images: &Path) -> Result<Vec<u8>, ReceiveError> {
    let failed = |action, path: &Path| {
        let path = path.to_owned();
        move |source| ReceiveError::File {
            action,
            path,
            source,
        }
    };
    let inventory = arriving.join(gate::INVENTORY);
    let content = fs::read(&inventory).map_err(failed("read", &inventory))?;
    let names = fs::read_dir(arriving).map_err(failed("list", arriving))?;
    for name in names {
        let name = name.map_err(failed("list", arriving))?.file_name();
        if name != gate::INVENTORY {
            let path = arriving.join(&name);
            fs::rename(&path, images.join(&name)).map_err(failed("move", &path))?;
        }
    }
    Ok(content)
}

pub(super) fn flags_from_wire(options: pb::RestoreOptions) -> RestoreFlags {
    RestoreFlags {
        tcp_established: options.tcp_established,
        tcp_close: options.tcp_close,
        file_locks: options.file_locks,
        ext_unix_sk: options.ext_unix_sk,
        shell_job: options.shell_job,
    }
}
