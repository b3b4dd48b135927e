CREATE TABLE events (
    id VARCHAR(64) NOT NULL,
    time DOUBLE PRECISION NOT NULL,
    bundle VARCHAR(64) NOT NULL,
    image_sha256 VARCHAR(64) NOT NULL,
    action VARCHAR(8) NOT NULL,
    stage VARCHAR(1) NOT NULL,
    label TEXT NOT NULL,
    prob_a DOUBLE PRECISION,
    prob_b DOUBLE PRECISION,
    confidence DOUBLE PRECISION,
    gate_logit DOUBLE PRECISION,
    exit_score DOUBLE PRECISION,
    threshold DOUBLE PRECISION NOT NULL,
    propensity DOUBLE PRECISION NOT NULL,
    selected BOOLEAN NOT NULL,
    sketch BYTEA NOT NULL,
    reviews INTEGER NOT NULL,
    PRIMARY KEY (id)
);
CREATE INDEX events_to_review ON events (time, id) WHERE reviews > 0;
CREATE INDEX events_by_time ON events (time, id);
COMMENT ON COLUMN events.reviews IS 'how many reviewers are wanted';
CREATE OR REPLACE FUNCTION events_append_only() RETURNS trigger AS $$ BEGIN RAISE EXCEPTION 'events is append-only: add a row that supersedes instead'; END $$ LANGUAGE plpgsql;
CREATE TRIGGER events_no_update BEFORE UPDATE ON events FOR EACH ROW EXECUTE FUNCTION events_append_only();
CREATE TRIGGER events_no_delete BEFORE DELETE ON events FOR EACH ROW EXECUTE FUNCTION events_append_only();
CREATE TRIGGER events_no_truncate BEFORE TRUNCATE ON events FOR EACH STATEMENT EXECUTE FUNCTION events_append_only();
CREATE TABLE served_bundles (
    bundle VARCHAR(64) NOT NULL,
    facts TEXT NOT NULL,
    PRIMARY KEY (bundle)
);
CREATE TABLE log_positions (
    log VARCHAR(64) NOT NULL,
    segment INTEGER NOT NULL,
    position INTEGER NOT NULL,
    PRIMARY KEY (log)
);
CREATE TABLE leases (
    event_id VARCHAR(64) NOT NULL,
    reviewer TEXT NOT NULL,
    expires DOUBLE PRECISION NOT NULL,
    PRIMARY KEY (event_id)
);
CREATE TABLE guards (
    epoch VARCHAR(80) NOT NULL,
    looks INTEGER NOT NULL,
    level FLOAT NOT NULL,
    time FLOAT NOT NULL,
    PRIMARY KEY (epoch)
);
CREATE OR REPLACE FUNCTION guards_append_only() RETURNS trigger AS $$ BEGIN RAISE EXCEPTION 'guards is append-only: add a row that supersedes instead'; END $$ LANGUAGE plpgsql;
CREATE TRIGGER guards_no_update BEFORE UPDATE ON guards FOR EACH ROW EXECUTE FUNCTION guards_append_only();
CREATE TRIGGER guards_no_delete BEFORE DELETE ON guards FOR EACH ROW EXECUTE FUNCTION guards_append_only();
CREATE TRIGGER guards_no_truncate BEFORE TRUNCATE ON guards FOR EACH STATEMENT EXECUTE FUNCTION guards_append_only();
CREATE TABLE audit (
    seq INTEGER NOT NULL,
    time DOUBLE PRECISION NOT NULL,
    kind VARCHAR(40) NOT NULL,
    body TEXT NOT NULL,
    previous VARCHAR(64) NOT NULL,
    hash VARCHAR(64) NOT NULL,
    PRIMARY KEY (seq),
    UNIQUE (hash)
);
CREATE OR REPLACE FUNCTION audit_append_only() RETURNS trigger AS $$ BEGIN RAISE EXCEPTION 'audit is append-only: add a row that supersedes instead'; END $$ LANGUAGE plpgsql;
CREATE TRIGGER audit_no_update BEFORE UPDATE ON audit FOR EACH ROW EXECUTE FUNCTION audit_append_only();
CREATE TRIGGER audit_no_delete BEFORE DELETE ON audit FOR EACH ROW EXECUTE FUNCTION audit_append_only();
CREATE TRIGGER audit_no_truncate BEFORE TRUNCATE ON audit FOR EACH STATEMENT EXECUTE FUNCTION audit_append_only();
CREATE TABLE aliases (
    name VARCHAR(10) NOT NULL,
    version INTEGER NOT NULL,
    bundle VARCHAR(64),
    parent INTEGER,
    share DOUBLE PRECISION,
    time DOUBLE PRECISION NOT NULL,
    by TEXT NOT NULL,
    PRIMARY KEY (name, version)
);
CREATE OR REPLACE FUNCTION aliases_append_only() RETURNS trigger AS $$ BEGIN RAISE EXCEPTION 'aliases is append-only: add a row that supersedes instead'; END $$ LANGUAGE plpgsql;
CREATE TRIGGER aliases_no_update BEFORE UPDATE ON aliases FOR EACH ROW EXECUTE FUNCTION aliases_append_only();
CREATE TRIGGER aliases_no_delete BEFORE DELETE ON aliases FOR EACH ROW EXECUTE FUNCTION aliases_append_only();
CREATE TRIGGER aliases_no_truncate BEFORE TRUNCATE ON aliases FOR EACH STATEMENT EXECUTE FUNCTION aliases_append_only();
CREATE TABLE thresholds (
    version INTEGER NOT NULL,
    bundle VARCHAR(64) NOT NULL,
    threshold DOUBLE PRECISION NOT NULL,
    time DOUBLE PRECISION NOT NULL,
    PRIMARY KEY (version)
);
CREATE OR REPLACE FUNCTION thresholds_append_only() RETURNS trigger AS $$ BEGIN RAISE EXCEPTION 'thresholds is append-only: add a row that supersedes instead'; END $$ LANGUAGE plpgsql;
CREATE TRIGGER thresholds_no_update BEFORE UPDATE ON thresholds FOR EACH ROW EXECUTE FUNCTION thresholds_append_only();
CREATE TRIGGER thresholds_no_delete BEFORE DELETE ON thresholds FOR EACH ROW EXECUTE FUNCTION thresholds_append_only();
CREATE TRIGGER thresholds_no_truncate BEFORE TRUNCATE ON thresholds FOR EACH STATEMENT EXECUTE FUNCTION thresholds_append_only();
CREATE TABLE audit_rates (
    version INTEGER NOT NULL,
    rate DOUBLE PRECISION,
    time DOUBLE PRECISION NOT NULL,
    PRIMARY KEY (version)
);
CREATE OR REPLACE FUNCTION audit_rates_append_only() RETURNS trigger AS $$ BEGIN RAISE EXCEPTION 'audit_rates is append-only: add a row that supersedes instead'; END $$ LANGUAGE plpgsql;
CREATE TRIGGER audit_rates_no_update BEFORE UPDATE ON audit_rates FOR EACH ROW EXECUTE FUNCTION audit_rates_append_only();
CREATE TRIGGER audit_rates_no_delete BEFORE DELETE ON audit_rates FOR EACH ROW EXECUTE FUNCTION audit_rates_append_only();
CREATE TRIGGER audit_rates_no_truncate BEFORE TRUNCATE ON audit_rates FOR EACH STATEMENT EXECUTE FUNCTION audit_rates_append_only();
CREATE TABLE alerts (
    seq INTEGER NOT NULL,
    key VARCHAR(120) NOT NULL,
    body TEXT NOT NULL,
    time DOUBLE PRECISION NOT NULL,
    PRIMARY KEY (key)
);
CREATE OR REPLACE FUNCTION alerts_append_only() RETURNS trigger AS $$ BEGIN RAISE EXCEPTION 'alerts is append-only: add a row that supersedes instead'; END $$ LANGUAGE plpgsql;
CREATE TRIGGER alerts_no_update BEFORE UPDATE ON alerts FOR EACH ROW EXECUTE FUNCTION alerts_append_only();
CREATE TRIGGER alerts_no_delete BEFORE DELETE ON alerts FOR EACH ROW EXECUTE FUNCTION alerts_append_only();
CREATE TRIGGER alerts_no_truncate BEFORE TRUNCATE ON alerts FOR EACH STATEMENT EXECUTE FUNCTION alerts_append_only();
CREATE TABLE alerts_sent (
    key VARCHAR(120) NOT NULL,
    hook VARCHAR(64) NOT NULL,
    time DOUBLE PRECISION NOT NULL,
    PRIMARY KEY (key, hook)
);
CREATE OR REPLACE FUNCTION alerts_sent_append_only() RETURNS trigger AS $$ BEGIN RAISE EXCEPTION 'alerts_sent is append-only: add a row that supersedes instead'; END $$ LANGUAGE plpgsql;
CREATE TRIGGER alerts_sent_no_update BEFORE UPDATE ON alerts_sent FOR EACH ROW EXECUTE FUNCTION alerts_sent_append_only();
CREATE TRIGGER alerts_sent_no_delete BEFORE DELETE ON alerts_sent FOR EACH ROW EXECUTE FUNCTION alerts_sent_append_only();
CREATE TRIGGER alerts_sent_no_truncate BEFORE TRUNCATE ON alerts_sent FOR EACH STATEMENT EXECUTE FUNCTION alerts_sent_append_only();
CREATE TABLE loop (
    id INTEGER NOT NULL,
    version INTEGER NOT NULL,
    state VARCHAR(16) NOT NULL,
    body TEXT NOT NULL,
    time DOUBLE PRECISION NOT NULL,
    PRIMARY KEY (id)
);
CREATE TABLE labels (
    id SERIAL NOT NULL,
    kind VARCHAR(6) NOT NULL,
    event_id VARCHAR(64) NOT NULL,
    label TEXT,
    source VARCHAR(6) NOT NULL,
    trust INTEGER NOT NULL,
    annotator TEXT NOT NULL,
    time DOUBLE PRECISION NOT NULL,
    supersedes INTEGER,
    PRIMARY KEY (id),
    CONSTRAINT labels_kind CHECK (kind IN ('answer', 'skip', 'undo')),
    CONSTRAINT labels_answer CHECK ((kind = 'answer') = (label IS NOT NULL)),
    CONSTRAINT labels_undo CHECK ((kind = 'undo') <= (supersedes IS NOT NULL)),
    FOREIGN KEY(event_id) REFERENCES events (id),
    UNIQUE (supersedes),
    FOREIGN KEY(supersedes) REFERENCES labels (id)
);
CREATE INDEX ix_labels_event_id ON labels (event_id);
CREATE OR REPLACE FUNCTION labels_append_only() RETURNS trigger AS $$ BEGIN RAISE EXCEPTION 'labels is append-only: add a row that supersedes instead'; END $$ LANGUAGE plpgsql;
CREATE TRIGGER labels_no_update BEFORE UPDATE ON labels FOR EACH ROW EXECUTE FUNCTION labels_append_only();
CREATE TRIGGER labels_no_delete BEFORE DELETE ON labels FOR EACH ROW EXECUTE FUNCTION labels_append_only();
CREATE TRIGGER labels_no_truncate BEFORE TRUNCATE ON labels FOR EACH STATEMENT EXECUTE FUNCTION labels_append_only();
CREATE TABLE guard_rows (
    epoch VARCHAR(80) NOT NULL,
    place INTEGER NOT NULL,
    row_id VARCHAR(200) NOT NULL,
    cluster VARCHAR(200) NOT NULL,
    label VARCHAR(200),
    source VARCHAR(20),
    PRIMARY KEY (epoch, place),
    FOREIGN KEY(epoch) REFERENCES guards (epoch)
);
CREATE INDEX ix_guard_rows_row_id ON guard_rows (row_id);
CREATE OR REPLACE FUNCTION guard_rows_append_only() RETURNS trigger AS $$ BEGIN RAISE EXCEPTION 'guard_rows is append-only: label and source can be given once, nothing else changes'; END $$ LANGUAGE plpgsql;
CREATE TRIGGER guard_rows_no_update BEFORE UPDATE ON guard_rows FOR EACH ROW WHEN (NOT (NEW.epoch IS NOT DISTINCT FROM OLD.epoch AND NEW.place IS NOT DISTINCT FROM OLD.place AND NEW.row_id IS NOT DISTINCT FROM OLD.row_id AND NEW.cluster IS NOT DISTINCT FROM OLD.cluster AND (OLD.label IS NULL OR NEW.label IS NOT DISTINCT FROM OLD.label) AND (OLD.source IS NULL OR NEW.source IS NOT DISTINCT FROM OLD.source))) EXECUTE FUNCTION guard_rows_append_only();
CREATE TRIGGER guard_rows_no_delete BEFORE DELETE ON guard_rows FOR EACH ROW EXECUTE FUNCTION guard_rows_append_only();
CREATE TRIGGER guard_rows_no_truncate BEFORE TRUNCATE ON guard_rows FOR EACH STATEMENT EXECUTE FUNCTION guard_rows_append_only();
CREATE TABLE looks (
    epoch VARCHAR(80) NOT NULL,
    number INTEGER NOT NULL,
    asked VARCHAR(64) NOT NULL,
    candidate VARCHAR(80) NOT NULL,
    time FLOAT NOT NULL,
    promoted BOOLEAN,
    PRIMARY KEY (epoch, number),
    CONSTRAINT look_number CHECK (number >= 1),
    FOREIGN KEY(epoch) REFERENCES guards (epoch)
);
CREATE OR REPLACE FUNCTION looks_append_only() RETURNS trigger AS $$ BEGIN RAISE EXCEPTION 'looks is append-only: promoted can be given once, nothing else changes'; END $$ LANGUAGE plpgsql;
CREATE TRIGGER looks_no_update BEFORE UPDATE ON looks FOR EACH ROW WHEN (NOT (NEW.epoch IS NOT DISTINCT FROM OLD.epoch AND NEW.number IS NOT DISTINCT FROM OLD.number AND NEW.asked IS NOT DISTINCT FROM OLD.asked AND NEW.candidate IS NOT DISTINCT FROM OLD.candidate AND NEW.time IS NOT DISTINCT FROM OLD.time AND (OLD.promoted IS NULL OR NEW.promoted IS NOT DISTINCT FROM OLD.promoted))) EXECUTE FUNCTION looks_append_only();
CREATE TRIGGER looks_no_delete BEFORE DELETE ON looks FOR EACH ROW EXECUTE FUNCTION looks_append_only();
CREATE TRIGGER looks_no_truncate BEFORE TRUNCATE ON looks FOR EACH STATEMENT EXECUTE FUNCTION looks_append_only();
INSERT INTO alerts ("seq", "key", "body", "time") VALUES (1, 'alarm/1/1.0', '{"format_version":1,"time":1.0,"kind":"alarm","title":"Alarm","text":"Something.","bundle":"","figures":{}}', 1.0);
INSERT INTO aliases ("name", "version", "bundle", "parent", "share", "time", "by") VALUES ('champion', 1, 'abababababababababababababababababababababababababababababababab', NULL, NULL, 0.0, 'somebody');
INSERT INTO audit ("seq", "time", "kind", "body", "previous", "hash") VALUES (1, 0.0, 'begin', '{"by":"somebody","champion":"abababababababababababababababababababababababababababababababab"}', '0000000000000000000000000000000000000000000000000000000000000000', 'f44b63c47becb2026eb4eeabd365fdb962231fdc5e83d9d6e86601cf5dcfaeae');
INSERT INTO audit ("seq", "time", "kind", "body", "previous", "hash") VALUES (2, 1.0, 'threshold', '{"bundle":"abababababababababababababababababababababababababababababababab","threshold":0.75}', 'f44b63c47becb2026eb4eeabd365fdb962231fdc5e83d9d6e86601cf5dcfaeae', '6d4f4aaa507a06bb683b36e8e9d7ffdf1a058b4acbdffacf528b53e6bebef27c');
INSERT INTO events ("id", "time", "bundle", "image_sha256", "action", "stage", "label", "prob_a", "prob_b", "confidence", "gate_logit", "exit_score", "threshold", "propensity", "selected", "sketch", "reviews") VALUES ('e0', 0.0, 'abababababababababababababababababababababababababababababababab', '0000000000000000000000000000000000000000000000000000000000000000', 'defer', 'B', 'none', 0.25, 0.5, 0.75, NULL, 0.75, 0.5, 0.5, true, '\x00000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000', 1);
INSERT INTO events ("id", "time", "bundle", "image_sha256", "action", "stage", "label", "prob_a", "prob_b", "confidence", "gate_logit", "exit_score", "threshold", "propensity", "selected", "sketch", "reviews") VALUES ('e1', 1.0, 'abababababababababababababababababababababababababababababababab', '0000000000000000000000000000000000000000000000000000000000000001', 'exit', 'A', 'none', 0.25, NULL, 0.75, NULL, 0.75, 0.5, 0.5, true, '\x0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f0000003f', 1);
INSERT INTO events ("id", "time", "bundle", "image_sha256", "action", "stage", "label", "prob_a", "prob_b", "confidence", "gate_logit", "exit_score", "threshold", "propensity", "selected", "sketch", "reviews") VALUES ('e2', 2.0, 'abababababababababababababababababababababababababababababababab', '0000000000000000000000000000000000000000000000000000000000000002', 'defer', 'B', 'none', 0.25, 0.5, 0.75, NULL, 0.75, 0.5, 0.5, true, '\x0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f0000803f', 1);
INSERT INTO guards ("epoch", "looks", "level", "time") VALUES ('round-1', 10, 0.01, 2.0);
INSERT INTO loop ("id", "version", "state", "body", "time") VALUES (1, 1, 'MONITOR', '{"version":1,"state":"MONITOR","time":0.0,"round":{"number":0,"entered":0.0,"reasons":[],"champion":"","champion_version":0,"snapshot":null,"proposals":[],"chosen":null,"recalibrated":null,"candidate":null,"verdict":null,"shadow_since":null,"approved_by":null,"note":""},"memory":{}}', 0.0);
INSERT INTO served_bundles ("bundle", "facts") VALUES ('abababababababababababababababababababababababababababababababab', '{"bundle":"abababababababababababababababababababababababababababababababab","classes":["none","works"],"positive":"works"}');
INSERT INTO thresholds ("version", "bundle", "threshold", "time") VALUES (1, 'abababababababababababababababababababababababababababababababab', 0.75, 1.0);
INSERT INTO guard_rows ("epoch", "place", "row_id", "cluster", "label", "source") VALUES ('round-1', 0, 'r0', 'c0', 'works', 'review');
INSERT INTO guard_rows ("epoch", "place", "row_id", "cluster", "label", "source") VALUES ('round-1', 1, 'r1', 'c1', NULL, NULL);
INSERT INTO labels ("id", "kind", "event_id", "label", "source", "trust", "annotator", "time", "supersedes") VALUES (1, 'answer', 'e0', 'works', 'review', 2, 'ann', 5.0, NULL);
INSERT INTO labels ("id", "kind", "event_id", "label", "source", "trust", "annotator", "time", "supersedes") VALUES (2, 'answer', 'e1', 'none', 'owner', 3, 'bob', 6.0, NULL);
INSERT INTO labels ("id", "kind", "event_id", "label", "source", "trust", "annotator", "time", "supersedes") VALUES (3, 'undo', 'e0', NULL, 'review', 2, 'ann', 7.0, 1);
SELECT setval('labels_id_seq', 3);
