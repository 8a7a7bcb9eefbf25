//! The durable catalog: SQLite in one file, with journalled intents.
