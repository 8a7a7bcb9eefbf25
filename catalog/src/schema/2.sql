-- Version 2: where a domain's disk has gone, so that an old document of the domain can be told and brought up to date.
-- `source` is JSON of what the disk was; the record tells what it is since.

CREATE TABLE moves (
    seq     INTEGER PRIMARY KEY,
    domain  TEXT NOT NULL,
    target  TEXT NOT NULL,
    source  TEXT NOT NULL,
    version INTEGER NOT NULL,
    record  TEXT NOT NULL,
    UNIQUE (domain, target, source)
) STRICT;
CREATE INDEX moves_by_age ON moves (domain, seq);
