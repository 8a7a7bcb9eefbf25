//! What a running domain answers to: QMP monitor, guest agent, NBD server.
