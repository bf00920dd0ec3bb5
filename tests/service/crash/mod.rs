//! Kills gateways and workers over one folder, at named points and at any moment, and asks an outside witness
//! whether every job that was accepted ended, and ended once. The witness knows what a client knows: the ids that
//! it was given, the statuses that it saw, the webhooks that it received.
//!
//! A short run is part of every test run; `scripts/crash-suite.sh` makes a long one.

mod witness;

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::Value;
use tempfile::tempdir;

use self::witness::{Hooks, Witness};
use crate::pool::gateway::{Gateway, job, send_signal, within};
use crate::support::is_long;

/// Where the gateway kills itself. K12 needs a store of an older version, which its own tests have.
const GATEWAY_POINTS: [&str; 12] =
    ["K1", "K2", "K3", "K4", "K5", "K6", "K7", "K8", "K9", "K10", "K11", "K13"];
/// Where every worker kills itself. The others of K14–K24 lie in generations, which no job here makes.
const WORKER_POINTS: [&str; 7] = ["K14", "K16", "K19", "K21", "K22", "K23", "K24"];
/// Processes killed by a short run, and by a long one.
const KILLS: (u32, u32) = (36, 1000);
/// How long a point may stay unreached before the gateway is killed all the same.
const UNREACHED: Duration = Duration::from_secs(3);

/// What is killed.
#[derive(Debug, Default)]
struct Kills {
    gateways: u32,
    workers: u32,
    /// Of the gateways, those that reached the point at which they were to die.
    at_points: u32,
}

#[test]
fn every_accepted_job_ends_once_whatever_is_killed() {
    let seed = std::env::var("TALKIE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(20_261_121);
    let wanted = if is_long() { KILLS.1 } else { KILLS.0 };
    let dir = tempdir().unwrap();
    let mut suite = Suite {
        dir: dir.path(),
        random: StdRng::seed_from_u64(seed),
        witness: Witness::default(),
        hooks: Hooks::start(),
        kills: Kills::default(),
    };
    let mut round = 0;
    while suite.kills.gateways + suite.kills.workers < wanted {
        suite.round(round);
        round += 1;
        if round % 100 == 0 {
            eprintln!("{round} rounds: {:?}", suite.kills);
        }
    }
    let summary = suite.settle();
    eprintln!("seed {seed}: {summary}");
}

struct Suite<'a> {
    dir: &'a Path,
    random: StdRng,
    witness: Witness,
    hooks: Hooks,
    kills: Kills,
}

impl Suite<'_> {
    /// The life of one gateway.
    fn round(&mut self, round: usize) {
        let turn = round % 3;
        let point = match turn {
            0 => Some(*GATEWAY_POINTS.choose(&mut self.random).unwrap()),
            1 => Some(*WORKER_POINTS.choose(&mut self.random).unwrap()),
            _ => None,
        };
        let variable = point.map(|point| format!("{point}:{}", self.random.random_range(1..=3)));
        let mut gateway = match self.start(variable.as_deref()) {
            Ok(gateway) => gateway,
            // What was left of the last round has brought it to its point before it could say where it listens.
            Err(log) if variable.is_some() && !log.contains("\"code\"") => {
                self.kills.gateways += 1;
                self.kills.at_points += 1;
                return;
            }
            Err(log) => panic!("the gateway did not start: {log}"),
        };
        self.hooks.check(&mut self.witness);
        self.witness.check_some(&gateway, &mut self.random);
        for _ in 0..self.random.random_range(1..=4) {
            let what = *["instant", "steps 1", "steps 4"].choose(&mut self.random).unwrap();
            self.witness.send(&gateway, &self.hooks.on(job(what)));
        }
        match turn {
            0 => {
                let reached = within(UNREACHED, || gateway.has_ended().then_some(())).is_some();
                self.kills.at_points += u32::from(reached);
            }
            1 => {
                let died = || gateway.log().contains("signal 9").then_some(());
                self.kills.workers += u32::from(within(UNREACHED, died).is_some());
            }
            _ => self.any_moment(&gateway),
        }
        self.kills.gateways += 1;
        if gateway.has_ended() {
            let status = gateway.ended();
            assert_eq!(status.signal(), Some(libc::SIGKILL), "{variable:?} {status}\n{}", gateway.log());
        } else {
            gateway.kill();
        }
    }

    /// Lets some time pass, and kills the workers of that time as often as not.
    fn any_moment(&mut self, gateway: &Gateway) {
        // The moment is what is random here; nothing is waited for.
        std::thread::sleep(Duration::from_millis(self.random.random_range(0..600)));
        if let Some(worker) = gateway.children().first()
            && self.random.random_bool(0.7)
        {
            send_signal(*worker, libc::SIGKILL);
            self.kills.workers += 1;
            std::thread::sleep(Duration::from_millis(self.random.random_range(0..600)));
        }
    }

    /// What it has printed, where it has ended before it listened.
    fn start(&self, kill_at: Option<&str>) -> Result<Gateway, String> {
        // Jobs die with their processes here through no fault of their own.
        let mut variables = vec![("MAX_ATTEMPTS", "100000"), ("WEBHOOK_PAUSES", "0.2,0.2,0.2,0.2,1,1,1,1")];
        variables.extend(kill_at.map(|at| ("KILL_AT", at)));
        Gateway::try_start(self.dir, &variables)
    }

    /// Lets everything come to its end, and compares it with what was seen.
    fn settle(&mut self) -> String {
        let gateway = self.start(None).unwrap_or_else(|log| panic!("the gateway did not start: {log}"));
        self.witness.resend(&gateway);
        let ends: Vec<Value> = self.witness.accepted().iter().map(|id| gateway.end_of(id)).collect();
        for end in &ends {
            assert_eq!(end["status"], "COMPLETED", "{end}");
            self.witness.saw(end);
        }
        let told = within(Duration::from_secs(60), || {
            self.hooks.check(&mut self.witness);
            self.witness.untold().is_empty().then_some(())
        });
        assert!(told.is_some(), "no webhook came for {:?}", self.witness.untold());
        assert_eq!(gateway.health()["jobs"]["inQueue"], 0);
        format!("{:?}, {} jobs accepted, each ended once", self.kills, ends.len())
    }
}
