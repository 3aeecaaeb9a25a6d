//! Carries a container's writable overlay layer: scan, delta, stream, place
