//! A source's own streams into a recorder, and from there, by a delivery, into another:
//! both have the same.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use identity::{Authority, NodeIdentity};
use pages::{Batch, BatchSink, Record, RecordKind, SpaceId};
use proto::migration as pb;
use proto::migration::destination_message::Message as FromDestination;
use proto::migration::source_message::Message as ToDestination;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::*;
use crate::files::{Tree, TreeSender};
use crate::link::{Dialer, PeerStream};
use crate::session::Session;
use crate::streams::PageStreams;
use nodeapi::Ticket;

struct Lab {
    temp: tempfile::TempDir,
}

/// A recorder that can be reached.
struct Place {
    files: Files,
    directory: PathBuf,
    address: String,
    ticket: Ticket,
}

impl Lab {
    fn new() -> Self {
        let temp = tempfile::tempdir().unwrap();
        let authority = Authority::init(&temp.path().join("ca")).unwrap();
        let node = "a".parse().unwrap();
        authority.enroll(&node, &temp.path().join("pki")).unwrap();
        let tree = temp.path().join("tree");
        fs::create_dir_all(tree.join("sub")).unwrap();
        fs::write(tree.join("sub/file"), "content").unwrap();
        Self { temp }
    }

    fn pki(&self) -> PathBuf {
        self.temp.path().join("pki")
    }

    async fn place(&self, name: &str, limit: u64, says: Committed) -> Place {
        let directory = self.temp.path().join(name);
        let ticket = Ticket {
            id: name.to_owned(),
            secret: format!("secret of {name}"),
        };
        let files = Files::at(&directory);
        let recorder = Recorder::begin(
            files.clone(),
            ticket.clone(),
            format!("m-{name}"),
            limit,
            move || says.clone(),
        )
        .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let identity = NodeIdentity::load(&self.pki()).unwrap();
        let tls = TlsAcceptor::from(identity.server_config());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (tls, recorder) = (tls.clone(), recorder.clone());
                tokio::spawn(async move {
                    let stream = tls.accept(stream).await.unwrap();
                    // A client that goes away is no failure of the test.
                    drop(recorder.serve(PeerStream(stream)).await);
                });
            }
        });
        Place {
            files,
            directory,
            address,
            ticket,
        }
    }

    fn dialer(&self, to: &Place) -> Dialer {
        Dialer::new(to.address.clone(), "a", &self.pki(), &to.ticket).unwrap()
    }

    /// As a source does it, up to the word of the other side.
    async fn record(&self, to: &Place) -> FromDestination {
        let dialer = self.dialer(to);
        let mut session = Session::open(&dialer).await.unwrap();
        let say = ToDestination::Hello(pb::Hello {
            protocol_versions: vec![1],
            migration_id: format!("m-{}", to.ticket.id),
            ..Default::default()
        });
        session.say(say).await.unwrap();
        assert!(matches!(
            session.hear().await,
            Ok(FromDestination::Welcome(_))
        ));
        let prepare = pb::PrepareSwitch {
            descriptors_json: "[]".into(),
            restore: None,
            volumes: Vec::new(),
        };
        let say = ToDestination::PrepareSwitch(prepare);
        session.say(say).await.unwrap();
        assert!(matches!(
            session.hear().await,
            Ok(FromDestination::SwitchReady(_))
        ));
        let streams = PageStreams::open(&dialer, 2).await.unwrap();
        let client = dialer.connect().await.unwrap();
        let root = self.temp.path().join("tree");
        let tree = TreeSender::open(client, Tree::Layer, &root);
        let mut tree = tree.await.unwrap();
        let (streams, tree) = tokio::task::spawn_blocking(move || {
            let mut streams = streams;
            for number in 0..20 {
                // One that is refused half-way is told in the session.
                streams.send(batch(number)).ok();
            }
            tree.pass(true).unwrap();
            tree.flush_later().unwrap();
            (streams, tree)
        })
        .await
        .unwrap();
        session
            .say(ToDestination::Freezing(pb::Freezing {}))
            .await
            .unwrap();
        assert!(matches!(
            session.hear().await,
            Ok(FromDestination::Holding(_))
        ));
        let account = pb::Final {
            streams: streams.totals(),
            trees: vec![tree.total()],
            spaces: Vec::new(),
        };
        session.say(ToDestination::Final(account)).await.unwrap();
        match session.hear().await {
            Ok(FromDestination::Prepared(_)) => {}
            other => panic!("{other:?}"),
        }
        session
            .say(ToDestination::Commit(pb::Commit {}))
            .await
            .unwrap();
        session.hear().await.unwrap()
    }

    fn delivery(&self, from: &Place, to: &Place) -> Delivery {
        Delivery::new(
            from.files.clone(),
            format!("m-{}", to.ticket.id),
            (to.address.clone(), "a"),
            &self.pki(),
            &to.ticket,
        )
        .unwrap()
    }
}

fn batch(number: u8) -> Batch {
    Batch {
        space: SpaceId(1),
        records: vec![Record {
            addr: u64::from(number) << 26,
            pages: 1,
            kind: RecordKind::Data,
        }],
        payload: Bytes::from(vec![number; 4096]),
    }
}

fn content(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(directory).unwrap().flatten();
    files
        .map(|file| {
            let name = file.file_name().into_string().unwrap();
            (name, fs::read(file.path()).unwrap())
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_recorded_arrives_as_it_was_sent() {
    let lab = Lab::new();
    let first = lab.place("first", u64::MAX, Committed::Yes).await;
    assert!(matches!(
        lab.record(&first).await,
        FromDestination::Running(_)
    ));
    let recorded = content(&first.directory);
    let names: Vec<_> = recorded.keys().map(String::as_str).collect();
    assert_eq!(names, ["final", "pages-0", "pages-1", "prepare", "tree-1"]);

    let second = lab.place("second", u64::MAX, Committed::Yes).await;
    let ready = lab.delivery(&first, &second).until_prepared().await;
    let ready = ready.unwrap();
    assert!(ready.sent_bytes > 20 * 4096);
    assert_eq!(ready.commit().await.unwrap(), Word::Running);
    assert_eq!(content(&second.directory), recorded);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_damaged_on_disk_is_not_delivered() {
    let lab = Lab::new();
    let first = lab.place("first", u64::MAX, Committed::Yes).await;
    lab.record(&first).await;
    for name in ["pages-1", "tree-1", "final"] {
        let path = first.directory.join(name);
        let whole = fs::read(&path).unwrap();
        let mut damaged = whole.clone();
        *damaged.last_mut().unwrap() ^= 1;
        fs::write(&path, damaged).unwrap();
        let to = format!("to-{name}");
        let to = lab.place(&to, u64::MAX, Committed::Yes).await;
        let error = lab.delivery(&first, &to).until_prepared().await;
        let error = error.unwrap_err();
        assert!(!error.may_pass(), "{name}: {error}");
        fs::write(&path, whole).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_cannot_keep_it_hands_it_back() {
    let lab = Lab::new();
    let full = Committed::No("the disk is full".into());
    let first = lab.place("first", u64::MAX, full).await;
    match lab.record(&first).await {
        FromDestination::HandedBack(back) => assert_eq!(back.reason, "the disk is full"),
        other => panic!("{other:?}"),
    }
    let whole = lab.place("whole", u64::MAX, Committed::Yes).await;
    lab.record(&whole).await;
    let back = Committed::No("it does not start".into());
    let to = lab.place("to", u64::MAX, back).await;
    let ready = lab.delivery(&whole, &to).until_prepared().await.unwrap();
    let word = ready.commit().await.unwrap();
    assert_eq!(word, Word::HandedBack("it does not start".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn more_than_there_may_be_is_refused_before_the_commit() {
    let lab = Lab::new();
    let whole = lab.place("whole", u64::MAX, Committed::Yes).await;
    lab.record(&whole).await;
    let small = lab.place("small", 40_000, Committed::Yes).await;
    let error = lab.delivery(&whole, &small).until_prepared().await;
    let error = error.unwrap_err();
    assert!(error.may_pass());
    assert!(error.to_string().contains("larger than"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_does_not_know_the_secret_is_refused() {
    let lab = Lab::new();
    let mut place = lab.place("first", u64::MAX, Committed::Yes).await;
    place.ticket.secret = "another".into();
    assert!(Session::open(&lab.dialer(&place)).await.is_err());
}
