//! Node certificates and mutual TLS
