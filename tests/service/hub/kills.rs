//! Row 38 of the fault matrix: a download that is killed at any moment goes on where it was. A short run is part of
//! every test run; `scripts/prefetch-suite.sh` makes a long one.

use std::os::unix::process::ExitStatusExt;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::server::Answer;
use super::{Bench, LARGE, finish, signal};
use crate::support::is_long;

/// Bytes that may be fetched twice because of one kill.
const TWICE: u64 = 8 << 20;
/// Kills of a short run, and of a long one.
const KILLS: (u64, u64) = (8, 100);

#[test]
fn fault_38_kill_9_at_70_percent_fetches_little_twice() {
    let bench = Bench::new();
    // Each of the three pieces stops at 70 %.
    bench.hub.behave(|asked| match asked.range {
        Some((from, until)) if asked.of_cdn => Answer::Pause((until - from) * 7 / 10),
        _ => Answer::Right,
    });
    let mut child = bench.start(&[]);
    let come = LARGE as u64 * 7 / 10;
    bench.wait_for_bytes(come);
    signal(&child, libc::SIGKILL);
    assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
    bench.hub.go_on();
    let output = bench.run(&[]).output();
    let twice = output["fetched_bytes"].as_u64().unwrap() + come - LARGE as u64;
    assert!(twice <= TWICE / 4, "{twice} bytes were fetched twice");
    bench.check_complete(&bench.files());
}

#[test]
fn fault_38_kill_9_at_any_moment_ends_complete_and_verified() {
    let seed = std::env::var("TALKIE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(20_261_127);
    let mut random = StdRng::seed_from_u64(seed);
    let wanted = if is_long() { KILLS.1 } else { KILLS.0 };
    let (mut kills, mut twice) = (0, 0);
    while kills < wanted {
        let bench = Bench::new();
        let mut killed = 0;
        // The same download is killed up to four times.
        for _ in 0..random.random_range(1..=4) {
            killed += u64::from(kill_once(&bench, &mut random));
        }
        kills += killed;
        bench.hub.behave(|_| Answer::Right);
        bench.run(&[]).output();
        bench.check_complete(&bench.files());
        let more = bench.hub.served() - (LARGE as u64 + 8);
        assert!(more <= killed * TWICE, "seed {seed}: {more} bytes came twice after {killed} kills");
        twice += more;
    }
    eprintln!("{kills} kills, {} bytes fetched twice for each", twice / kills);
}

/// Kills a download when a certain number of bytes was sent, or at a named point. False when it ended before.
fn kill_once(bench: &Bench, random: &mut StdRng) -> bool {
    bench.hub.rearm();
    if random.random_bool(0.3) {
        bench.hub.behave(|_| Answer::Right);
        let point = ["K25", "K25:2", "K26"][random.random_range(0..3)];
        let ended = bench.start(&[("KILL_AT", point)]).wait_with_output().unwrap();
        return ended.status.signal() == Some(libc::SIGKILL);
    }
    let at = random.random_range(0..LARGE as u64);
    let (hub, before) = (bench.hub.clone(), bench.hub.served());
    bench.hub.behave(move |asked| match asked.range {
        Some((from, until)) if asked.of_cdn => {
            let left = at.saturating_sub(hub.served() - before);
            Answer::Pause(usize::try_from(left).unwrap().min(until - from))
        }
        _ => Answer::Right,
    });
    let mut child = bench.start(&[]);
    let paused = bench.hub.pauses_before_the_end_of(&mut child);
    if paused {
        signal(&child, libc::SIGKILL);
    }
    bench.hub.go_on();
    child.wait().unwrap().signal() == Some(libc::SIGKILL)
}

#[test]
fn ctrl_c_ends_a_download_that_can_be_gone_on_with() {
    let bench = Bench::new();
    bench.hub.behave(|asked| if asked.of_cdn { Answer::Pause(4 << 20) } else { Answer::Right });
    let child = bench.start(&[]);
    bench.wait_for_bytes(12 << 20);
    signal(&child, libc::SIGINT);
    let outcome = finish(child);
    assert_eq!((outcome.code, outcome.error()["code"].as_str()), (Some(1), Some("CANCELLED")));
    bench.hub.go_on();
    bench.hub.behave(|_| Answer::Right);
    let fetched = bench.run(&[]).output()["fetched_bytes"].as_u64().unwrap();
    assert!(fetched <= LARGE as u64 - (12 << 20) + TWICE / 4, "{fetched}");
    bench.check_complete(&bench.files());
}
