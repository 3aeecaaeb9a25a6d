//! Safe sessions over libcriu: dump, restore, notifications, versions
