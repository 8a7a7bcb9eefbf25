//! Starts real QEMUs, storage daemons and guests for disksnap's tests.
