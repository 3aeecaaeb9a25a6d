//! containerd's events of one container.

use crate::node::{Background, Node};
use crate::wait::eventually;

/// Events of a node, recorded from the moment this is made.
#[derive(Debug)]
pub struct Events(Background);

impl Events {
    /// Begins to record.
    pub fn record(node: &Node) -> Self {
        let mut recorder = Self(node.spawn(&["ctr", "events"]));
        // ctr does not say when it has subscribed: events of something harmless do.
        eventually("ctr events listens", || {
            node.ctr(&[
                "namespaces",
                "label",
                "default",
                "sterna.dev/test=listening",
            ])
            .success();
            (!recorder.0.lines().is_empty()).then_some(())
        });
        recorder
    }

    /// The topics of all events so far that name the container, without the
    /// leading "/tasks/"; those that are not about tasks are left out.
    pub fn of(&mut self, container: &str) -> Vec<String> {
        let id = format!("\"{container}\"");
        let about = |line: &&String| line.contains(&id);
        let topic = |line: &String| {
            let word = line
                .split_whitespace()
                .find(|word| word.starts_with("/tasks/"))?;
            Some(word.trim_start_matches("/tasks/").to_owned())
        };
        self.0
            .lines()
            .iter()
            .filter(about)
            .filter_map(topic)
            .collect()
    }

    /// Waits for an event, and returns all up to then.
    #[track_caller]
    pub fn until(&mut self, container: &str, topic: &str) -> Vec<String> {
        eventually(&format!("the event {topic} of {container}"), || {
            let topics = self.of(container);
            topics.iter().any(|seen| seen == topic).then_some(topics)
        })
    }
}
