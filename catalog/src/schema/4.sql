-- Version 4: snapshots that were deleted and are kept because a checkpoint is them. They have no name any more that
-- another snapshot could not have.

CREATE TABLE pinned (
    seq     INTEGER PRIMARY KEY,
    domain  TEXT NOT NULL,
    id      TEXT NOT NULL,
    created INTEGER NOT NULL, -- nanoseconds since 1970
    version INTEGER NOT NULL,
    record  TEXT NOT NULL,
    UNIQUE (domain, id)
) STRICT;
CREATE INDEX pinned_by_age ON pinned (domain, created, seq);
