//! The page engine: track, read, encode, stage, serve; no network, no CRIU
