//! Messages packed the way containerd does it: with the bare name of their type.

use containerd_shim_protos::cgroups::metrics::Metrics as MetricsV1;
use containerd_shim_protos::cgroups_v2::metrics::Metrics as MetricsV2;
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused,
    TaskResumed, TaskStart,
};
use containerd_shim_protos::shim::oci;
use protobuf::Message;
use protobuf::well_known_types::any::Any;

/// A message that is sent packed.
///
/// A message could be asked for its full name, but then protobuf parses the
/// descriptors of all files that it needs, comments included, and a small process
/// keeps them for good.
pub(crate) trait Packed: Message {
    /// The package that its name is in.
    const PACKAGE: &'static str;
}

macro_rules! packed {
    ($($package:literal: $($message:ty),* ;)*) => {
        $($(impl Packed for $message { const PACKAGE: &'static str = $package; })*)*

        #[cfg(test)]
        #[test]
        fn names_are_those_of_the_descriptors() {
            use protobuf::MessageFull;
            $($(assert_eq!(name::<$message>(), <$message>::descriptor().full_name());)*)*
        }
    };
}

packed! {
    "containerd.events": TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM,
        TaskPaused, TaskResumed, TaskStart;
    "containerd.runc.v1": oci::Options, oci::ProcessDetails;
    "io.containerd.cgroups.v1": MetricsV1;
    "io.containerd.cgroups.v2": MetricsV2;
}

fn name<M: Packed>() -> String {
    format!("{}.{}", M::PACKAGE, M::NAME)
}

/// Packs a message.
pub(crate) fn to_any<M: Packed>(message: &M) -> protobuf::Result<Any> {
    Ok(Any {
        type_url: name::<M>(),
        value: message.write_to_bytes()?,
        ..Default::default()
    })
}
