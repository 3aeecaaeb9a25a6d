//! Connections to the server.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use redis::{Client, Connection};

/// A server that answers nothing for this long has dropped the connection.
const PATIENCE: Duration = Duration::from_secs(60);
/// Where connections are made anew, an answer or a connection that takes this
/// long is given up: long beside a round trip, short beside an outage.
const RETRY_PATIENCE: Duration = Duration::from_millis(250);
/// Between two attempts to connect again.
const RETRY_INTERVAL: Duration = Duration::from_millis(5);

/// One connection, and what is done when it ends.
pub(crate) struct Link {
    client: Client,
    connection: Connection,
    reconnect: bool,
    /// Why it ended, the first time.
    pub(crate) dropped: Option<String>,
}

impl Link {
    /// Connects. With `reconnect`, a connection that ends is made anew.
    pub(crate) fn open(client: &Client, reconnect: bool) -> Result<Self> {
        let patience = if reconnect { RETRY_PATIENCE } else { PATIENCE };
        let connection = connect(client, patience).context("cannot connect")?;
        Ok(Self {
            client: client.clone(),
            connection,
            reconnect,
            dropped: None,
        })
    }

    pub(crate) fn connection(&mut self) -> &mut Connection {
        &mut self.connection
    }

    /// After an error: whether it is worth to go on. Blocks until there is a
    /// new connection or `stop`.
    pub(crate) fn recover(&mut self, error: &redis::RedisError, stop: &AtomicBool) -> bool {
        self.dropped.get_or_insert_with(|| error.to_string());
        if !self.reconnect {
            return false;
        }
        while !stop.load(Ordering::Relaxed) {
            let tried = Instant::now();
            if let Ok(connection) = connect(&self.client, RETRY_PATIENCE) {
                self.connection = connection;
                return true;
            }
            std::thread::sleep(RETRY_INTERVAL.saturating_sub(tried.elapsed()));
        }
        false
    }
}

fn connect(client: &Client, patience: Duration) -> redis::RedisResult<Connection> {
    let connection = client.get_connection_with_timeout(patience)?;
    connection.set_read_timeout(Some(patience))?;
    connection.set_write_timeout(Some(patience))?;
    Ok(connection)
}
