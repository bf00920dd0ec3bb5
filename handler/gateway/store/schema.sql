-- Columns that sweeps and counts read stand before the texts, which may be long.
CREATE TABLE jobs (
  -- The order in which jobs wait: that of acceptance, or of the sender's last retry.
  seq INTEGER PRIMARY KEY,
  id TEXT NOT NULL UNIQUE,
  endpoint TEXT NOT NULL,
  queue TEXT NOT NULL,
  status TEXT NOT NULL
    CHECK (status IN ('IN_QUEUE', 'IN_PROGRESS', 'COMPLETED', 'FAILED', 'CANCELLED', 'TIMED_OUT')),
  low_priority INTEGER NOT NULL,
  attempt INTEGER NOT NULL DEFAULT 0,
  -- Of the last attempt.
  worker TEXT,
  spawned INTEGER NOT NULL DEFAULT 0,
  created_ms INTEGER NOT NULL,
  started_ms INTEGER,
  finished_ms INTEGER,
  expires_ms INTEGER NOT NULL,
  execution_timeout_ms INTEGER NOT NULL,
  webhook TEXT,
  -- A JSON list: who was lost with this job, when and why.
  losses TEXT,
  request TEXT NOT NULL,
  output TEXT,
  error TEXT
) STRICT;
CREATE INDEX jobs_waiting ON jobs (queue) WHERE status = 'IN_QUEUE';
CREATE INDEX jobs_running ON jobs (worker) WHERE status = 'IN_PROGRESS';
CREATE INDEX jobs_of_endpoint ON jobs (endpoint);
CREATE INDEX jobs_expiring ON jobs (expires_ms);
CREATE INDEX jobs_finished ON jobs (finished_ms) WHERE finished_ms IS NOT NULL;

-- Keys outlive their jobs, so that a request that is sent again late is still not made twice.
CREATE TABLE idempotency (
  key TEXT PRIMARY KEY,
  body_hash BLOB NOT NULL,
  job TEXT NOT NULL,
  created_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX idempotency_age ON idempotency (created_ms);

CREATE TABLE chunks (
  seq INTEGER PRIMARY KEY,
  job INTEGER NOT NULL REFERENCES jobs ON DELETE CASCADE,
  output TEXT NOT NULL
) STRICT;
CREATE INDEX chunks_of_job ON chunks (job);

CREATE TABLE deliveries (
  job INTEGER PRIMARY KEY REFERENCES jobs ON DELETE CASCADE,
  tries INTEGER NOT NULL DEFAULT 0,
  due_ms INTEGER NOT NULL
) STRICT;
CREATE INDEX deliveries_due ON deliveries (due_ms);

CREATE TABLE keys (
  id TEXT PRIMARY KEY,
  name TEXT NOT NULL,
  role TEXT NOT NULL CHECK (role IN ('client', 'worker')),
  hash BLOB NOT NULL UNIQUE,
  created_ms INTEGER NOT NULL,
  revoked_ms INTEGER
) STRICT;
