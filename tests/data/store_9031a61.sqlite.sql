BEGIN TRANSACTION;
CREATE TABLE alerts (
    seq INTEGER NOT NULL,
    "key" VARCHAR(120) NOT NULL,
    body TEXT NOT NULL,
    time DOUBLE NOT NULL,
    PRIMARY KEY ("key")
);
INSERT INTO "alerts" VALUES(1,'alarm/1/1.0','{"format_version":1,"time":1.0,"kind":"alarm","title":"Alarm","text":"Something.","bundle":"","figures":{}}',1.0);
CREATE TABLE alerts_sent (
    "key" VARCHAR(120) NOT NULL,
    hook VARCHAR(64) NOT NULL,
    time DOUBLE NOT NULL,
    PRIMARY KEY ("key", hook)
);
CREATE TABLE aliases (
    name VARCHAR(10) NOT NULL,
    version INTEGER NOT NULL,
    bundle VARCHAR(64),
    parent INTEGER,
    share DOUBLE,
    time DOUBLE NOT NULL,
    "by" TEXT NOT NULL,
    PRIMARY KEY (name, version)
);
INSERT INTO "aliases" VALUES('champion',1,'abababababababababababababababababababababababababababababababab',NULL,NULL,0.0,'somebody');
CREATE TABLE audit (
    seq INTEGER NOT NULL,
    time DOUBLE NOT NULL,
    kind VARCHAR(40) NOT NULL,
    body TEXT NOT NULL,
    previous VARCHAR(64) NOT NULL,
    hash VARCHAR(64) NOT NULL,
    PRIMARY KEY (seq),
    UNIQUE (hash)
);
INSERT INTO "audit" VALUES(1,0.0,'begin','{"by":"somebody","champion":"abababababababababababababababababababababababababababababababab"}','0000000000000000000000000000000000000000000000000000000000000000','f44b63c47becb2026eb4eeabd365fdb962231fdc5e83d9d6e86601cf5dcfaeae');
INSERT INTO "audit" VALUES(2,1.0,'threshold','{"bundle":"abababababababababababababababababababababababababababababababab","threshold":0.75}','f44b63c47becb2026eb4eeabd365fdb962231fdc5e83d9d6e86601cf5dcfaeae','6d4f4aaa507a06bb683b36e8e9d7ffdf1a058b4acbdffacf528b53e6bebef27c');
CREATE TABLE audit_rates (
    version INTEGER NOT NULL,
    rate DOUBLE,
    time DOUBLE NOT NULL,
    PRIMARY KEY (version)
);
CREATE TABLE events (
    id VARCHAR(64) NOT NULL,
    time DOUBLE NOT NULL,
    bundle VARCHAR(64) NOT NULL,
    image_sha256 VARCHAR(64) NOT NULL,
    action VARCHAR(8) NOT NULL,
    stage VARCHAR(1) NOT NULL,
    label TEXT NOT NULL,
    prob_a DOUBLE,
    prob_b DOUBLE,
    confidence DOUBLE,
    gate_logit DOUBLE,
    exit_score DOUBLE,
    threshold DOUBLE NOT NULL,
    propensity DOUBLE NOT NULL,
    selected BOOLEAN NOT NULL,
    sketch BLOB NOT NULL,
    reviews INTEGER NOT NULL,
    PRIMARY KEY (id)
);
INSERT INTO "events" VALUES('e0',0.0,'abababababababababababababababababababababababababababababababab','0000000000000000000000000000000000000000000000000000000000000000','defer','B','none',0.25,0.5,0.75,NULL,0.75,0.5,0.5,1,X'00000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000',1);
INSERT INTO "events" VALUES('e1',1.0,'abababababababababababababababababababababababababababababababab','0000000000000000000000000000000000000000000000000000000000000001','exit','A','none',0.25,NULL,0.75,NULL,0.75,0.5,0.5,1,X'0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F0000003F',1);
INSERT INTO "events" VALUES('e2',2.0,'abababababababababababababababababababababababababababababababab','0000000000000000000000000000000000000000000000000000000000000002','defer','B','none',0.25,0.5,0.75,NULL,0.75,0.5,0.5,1,X'0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F0000803F',1);
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
INSERT INTO "guard_rows" VALUES('round-1',0,'r0','c0','works','review');
INSERT INTO "guard_rows" VALUES('round-1',1,'r1','c1',NULL,NULL);
CREATE TABLE guards (
    epoch VARCHAR(80) NOT NULL,
    looks INTEGER NOT NULL,
    level FLOAT NOT NULL,
    time FLOAT NOT NULL,
    PRIMARY KEY (epoch)
);
INSERT INTO "guards" VALUES('round-1',10,0.01,2.0);
CREATE TABLE labels (
    id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    kind VARCHAR(6) NOT NULL,
    event_id VARCHAR(64) NOT NULL,
    label TEXT,
    source VARCHAR(6) NOT NULL,
    trust INTEGER NOT NULL,
    annotator TEXT NOT NULL,
    time DOUBLE NOT NULL,
    supersedes INTEGER,
    CONSTRAINT labels_kind CHECK (kind IN ('answer', 'skip', 'undo')),
    CONSTRAINT labels_answer CHECK ((kind = 'answer') = (label IS NOT NULL)),
    CONSTRAINT labels_undo CHECK ((kind = 'undo') <= (supersedes IS NOT NULL)),
    FOREIGN KEY(event_id) REFERENCES events (id),
    UNIQUE (supersedes),
    FOREIGN KEY(supersedes) REFERENCES labels (id)
);
INSERT INTO "labels" VALUES(1,'answer','e0','works','review',2,'ann',5.0,NULL);
INSERT INTO "labels" VALUES(2,'answer','e1','none','owner',3,'bob',6.0,NULL);
INSERT INTO "labels" VALUES(3,'undo','e0',NULL,'review',2,'ann',7.0,1);
CREATE TABLE leases (
    event_id VARCHAR(64) NOT NULL,
    reviewer TEXT NOT NULL,
    expires DOUBLE NOT NULL,
    PRIMARY KEY (event_id)
);
CREATE TABLE log_positions (
    log VARCHAR(64) NOT NULL,
    segment INTEGER NOT NULL,
    position INTEGER NOT NULL,
    PRIMARY KEY (log)
);
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
CREATE TABLE loop (
    id INTEGER NOT NULL,
    version INTEGER NOT NULL,
    state VARCHAR(16) NOT NULL,
    body TEXT NOT NULL,
    time DOUBLE NOT NULL,
    PRIMARY KEY (id)
);
INSERT INTO "loop" VALUES(1,1,'MONITOR','{"version":1,"state":"MONITOR","time":0.0,"round":{"number":0,"entered":0.0,"reasons":[],"champion":"","champion_version":0,"snapshot":null,"proposals":[],"chosen":null,"recalibrated":null,"candidate":null,"verdict":null,"shadow_since":null,"approved_by":null,"note":""},"memory":{}}',0.0);
CREATE TABLE served_bundles (
    bundle VARCHAR(64) NOT NULL,
    facts TEXT NOT NULL,
    PRIMARY KEY (bundle)
);
INSERT INTO "served_bundles" VALUES('abababababababababababababababababababababababababababababababab','{"bundle":"abababababababababababababababababababababababababababababababab","classes":["none","works"],"positive":"works"}');
CREATE TABLE thresholds (
    version INTEGER NOT NULL,
    bundle VARCHAR(64) NOT NULL,
    threshold DOUBLE NOT NULL,
    time DOUBLE NOT NULL,
    PRIMARY KEY (version)
);
INSERT INTO "thresholds" VALUES(1,'abababababababababababababababababababababababababababababababab',0.75,1.0);
CREATE INDEX events_by_time ON events (time, id);
CREATE INDEX events_to_review ON events (time, id) WHERE reviews > 0;
CREATE TRIGGER events_no_update BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'events is append-only: add a row that supersedes instead'); END;
CREATE TRIGGER events_no_delete BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'events is append-only: add a row that supersedes instead'); END;
CREATE TRIGGER guards_no_update BEFORE UPDATE ON guards BEGIN SELECT RAISE(ABORT, 'guards is append-only: add a row that supersedes instead'); END;
CREATE TRIGGER guards_no_delete BEFORE DELETE ON guards BEGIN SELECT RAISE(ABORT, 'guards is append-only: add a row that supersedes instead'); END;
CREATE TRIGGER guards_no_replace BEFORE INSERT ON guards WHEN EXISTS (SELECT 1 FROM guards WHERE (epoch = NEW.epoch)) BEGIN SELECT RAISE(ABORT, 'guards is append-only: add a row that supersedes instead'); END;
CREATE TRIGGER audit_no_update BEFORE UPDATE ON audit BEGIN SELECT RAISE(ABORT, 'audit is append-only: add a row that supersedes instead'); END;
CREATE TRIGGER audit_no_delete BEFORE DELETE ON audit BEGIN SELECT RAISE(ABORT, 'audit is append-only: add a row that supersedes instead'); END;
CREATE TRIGGER audit_no_replace BEFORE INSERT ON audit WHEN EXISTS (SELECT 1 FROM audit WHERE (seq = NEW.seq) OR hash = NEW.hash) BEGIN SELECT RAISE(ABORT, 'audit is append-only: add a row that supersedes instead'); END;
CREATE TRIGGER aliases_no_update BEFORE UPDATE ON aliases BEGIN SELECT RAISE(ABORT, 'aliases is append-only: add a row that supersedes instead'); END;
CREATE TRIGGER aliases_no_delete BEFORE DELETE ON aliases BEGIN SELECT RAISE(ABORT, 'aliases is append-only: add a row that supersedes instead'); END;
CREATE TRIGGER thresholds_no_update BEFORE UPDATE ON thresholds BEGIN SELECT RAISE(ABORT, 'thresholds is append-only: add a row that supersedes instead'); END;
CREATE TRIGGER thresholds_no_delete BEFORE DELETE ON thresholds BEGIN SELECT RAISE(ABORT, 'thresholds is append-only: add a row that supersedes instead'); END;
CREATE TRIGGER thresholds_no_replace BEFORE INSERT ON thresholds WHEN EXISTS (SELECT 1 FROM thresholds WHERE (version = NEW.version)) BEGIN SELECT RAISE(ABORT, 'thresholds is append-only: add a row that supersedes instead'); END;
CREATE TRIGGER audit_rates_no_update BEFORE UPDATE ON audit_rates BEGIN SELECT RAISE(ABORT, 'audit_rates is append-only: add a row that supersedes instead'); END;
CREATE TRIGGER audit_rates_no_delete BEFORE DELETE ON audit_rates BEGIN SELECT RAISE(ABORT, 'audit_rates is append-only: add a row that supersedes instead'); END;
CREATE TRIGGER audit_rates_no_replace BEFORE INSERT ON audit_rates WHEN EXISTS (SELECT 1 FROM audit_rates WHERE (version = NEW.version)) BEGIN SELECT RAISE(ABORT, 'audit_rates is append-only: add a row that supersedes instead'); END;
CREATE TRIGGER alerts_no_update BEFORE UPDATE ON alerts BEGIN SELECT RAISE(ABORT, 'alerts is append-only: add a row that supersedes instead'); END;
CREATE TRIGGER alerts_no_delete BEFORE DELETE ON alerts BEGIN SELECT RAISE(ABORT, 'alerts is append-only: add a row that supersedes instead'); END;
CREATE TRIGGER alerts_sent_no_update BEFORE UPDATE ON alerts_sent BEGIN SELECT RAISE(ABORT, 'alerts_sent is append-only: add a row that supersedes instead'); END;
CREATE TRIGGER alerts_sent_no_delete BEFORE DELETE ON alerts_sent BEGIN SELECT RAISE(ABORT, 'alerts_sent is append-only: add a row that supersedes instead'); END;
CREATE INDEX ix_labels_event_id ON labels (event_id);
CREATE TRIGGER labels_no_update BEFORE UPDATE ON labels BEGIN SELECT RAISE(ABORT, 'labels is append-only: add a row that supersedes instead'); END;
CREATE TRIGGER labels_no_delete BEFORE DELETE ON labels BEGIN SELECT RAISE(ABORT, 'labels is append-only: add a row that supersedes instead'); END;
CREATE TRIGGER labels_no_replace BEFORE INSERT ON labels WHEN EXISTS (SELECT 1 FROM labels WHERE (id = NEW.id) OR supersedes = NEW.supersedes) BEGIN SELECT RAISE(ABORT, 'labels is append-only: add a row that supersedes instead'); END;
CREATE INDEX ix_guard_rows_row_id ON guard_rows (row_id);
CREATE TRIGGER guard_rows_no_update BEFORE UPDATE ON guard_rows WHEN NOT (NEW.epoch IS OLD.epoch AND NEW.place IS OLD.place AND NEW.row_id IS OLD.row_id AND NEW.cluster IS OLD.cluster AND (OLD.label IS NULL OR NEW.label IS OLD.label) AND (OLD.source IS NULL OR NEW.source IS OLD.source)) BEGIN SELECT RAISE(ABORT, 'guard_rows is append-only: label and source can be given once, nothing else changes'); END;
CREATE TRIGGER guard_rows_no_delete BEFORE DELETE ON guard_rows BEGIN SELECT RAISE(ABORT, 'guard_rows is append-only: label and source can be given once, nothing else changes'); END;
CREATE TRIGGER guard_rows_no_replace BEFORE INSERT ON guard_rows WHEN EXISTS (SELECT 1 FROM guard_rows WHERE (epoch = NEW.epoch AND place = NEW.place)) BEGIN SELECT RAISE(ABORT, 'guard_rows is append-only: label and source can be given once, nothing else changes'); END;
CREATE TRIGGER looks_no_update BEFORE UPDATE ON looks WHEN NOT (NEW.epoch IS OLD.epoch AND NEW.number IS OLD.number AND NEW.asked IS OLD.asked AND NEW.candidate IS OLD.candidate AND NEW.time IS OLD.time AND (OLD.promoted IS NULL OR NEW.promoted IS OLD.promoted)) BEGIN SELECT RAISE(ABORT, 'looks is append-only: promoted can be given once, nothing else changes'); END;
CREATE TRIGGER looks_no_delete BEFORE DELETE ON looks BEGIN SELECT RAISE(ABORT, 'looks is append-only: promoted can be given once, nothing else changes'); END;
CREATE TRIGGER looks_no_replace BEFORE INSERT ON looks WHEN EXISTS (SELECT 1 FROM looks WHERE (epoch = NEW.epoch AND number = NEW.number)) BEGIN SELECT RAISE(ABORT, 'looks is append-only: promoted can be given once, nothing else changes'); END;
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('labels',3);
COMMIT;
