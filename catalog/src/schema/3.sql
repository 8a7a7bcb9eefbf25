-- Version 3: a domain's checkpoints. Which came from which is in the records alone: a set is always read as a whole.

CREATE TABLE checkpoints (
    seq     INTEGER PRIMARY KEY,
    domain  TEXT NOT NULL,
    name    TEXT NOT NULL,
    created INTEGER NOT NULL, -- nanoseconds since 1970
    version INTEGER NOT NULL,
    record  TEXT NOT NULL,
    UNIQUE (domain, name)
) STRICT;
CREATE INDEX checkpoints_by_age ON checkpoints (domain, created, seq);
