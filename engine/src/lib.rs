//! The two processes of a migration: sender and receiver
