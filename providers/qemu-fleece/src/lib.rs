//! Image fleecing inside QEMU: copy-before-write, read back over NBD.
