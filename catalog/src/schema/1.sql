-- Version 1 of the catalog. `domain` is the domain's UUID as text; `record` is JSON of the core type,
-- `version` the version of its form; `seq` keeps the order in which rows came to be.

CREATE TABLE definitions (
    domain  TEXT NOT NULL PRIMARY KEY,
    name    TEXT NOT NULL UNIQUE,
    version INTEGER NOT NULL,
    record  TEXT NOT NULL
) STRICT;

CREATE TABLE snapshots (
    seq     INTEGER PRIMARY KEY,
    domain  TEXT NOT NULL,
    id      TEXT NOT NULL,
    name    TEXT NOT NULL,
    created INTEGER NOT NULL, -- nanoseconds since 1970
    version INTEGER NOT NULL,
    record  TEXT NOT NULL,
    UNIQUE (domain, id),
    UNIQUE (domain, name)
) STRICT;
CREATE INDEX snapshots_by_age ON snapshots (domain, created, seq);

-- Names of deleted snapshots: a second delete gets the answer of the first.
CREATE TABLE tombstones (
    seq    INTEGER PRIMARY KEY,
    domain TEXT NOT NULL,
    name   TEXT NOT NULL,
    id     TEXT NOT NULL
) STRICT;
CREATE INDEX tombstones_by_name ON tombstones (domain, name, seq);
CREATE INDEX tombstones_by_age ON tombstones (domain, seq);

CREATE TABLE intents (
    seq     INTEGER PRIMARY KEY,
    id      TEXT NOT NULL UNIQUE,
    domain  TEXT NOT NULL,
    version INTEGER NOT NULL,
    record  TEXT NOT NULL
) STRICT;
CREATE INDEX intents_by_domain ON intents (domain, seq);

CREATE TABLE servers (
    domain  TEXT NOT NULL PRIMARY KEY,
    version INTEGER NOT NULL,
    record  TEXT NOT NULL
) STRICT;

CREATE TABLE exports (
    seq     INTEGER PRIMARY KEY,
    domain  TEXT NOT NULL,
    alias   TEXT NOT NULL,
    version INTEGER NOT NULL,
    record  TEXT NOT NULL,
    UNIQUE (domain, alias)
) STRICT;
CREATE INDEX exports_by_age ON exports (domain, seq);
