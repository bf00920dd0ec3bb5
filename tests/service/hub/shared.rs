//! Rows 39 and 40 of the fault matrix: several processes on one volume.

use std::io::{BufRead, BufReader};
use std::process::Child;
use std::thread;

use super::server::Answer;
use super::{Bench, LARGE, finish, signal};

/// Checks that `children` all succeeded and every byte was served once.
fn check(bench: &Bench, children: Vec<Child>) {
    let mut fetched = Vec::new();
    for child in children {
        fetched.push(finish(child).output()["fetched_bytes"].as_u64().unwrap());
    }
    bench.check_complete(&bench.files());
    assert_eq!(bench.hub.served(), LARGE as u64 + 8, "each byte is served once: {fetched:?}");
    assert_eq!(fetched.iter().filter(|bytes| **bytes > 0).count(), 1, "one process fetches: {fetched:?}");
}

#[test]
fn fault_39_two_processes_on_one_volume_fetch_each_byte_once() {
    let bench = Bench::new();
    check(&bench, (0..2).map(|_| bench.start(&[])).collect());
}

#[test]
fn fault_39_eight_processes_on_one_volume_fetch_each_byte_once_and_follow_the_one() {
    let bench = Bench::new();
    bench.hub.behave(|asked| if asked.of_cdn { Answer::Pause(1 << 20) } else { Answer::Right });
    let first = bench.start(&[]);
    bench.hub.wait_for_pause();
    let others: Vec<_> = (0..6).map(|_| bench.start(&[])).collect();
    let mut waiting = bench.start(&[]);
    let mut lines = BufReader::new(waiting.stderr.take().unwrap()).lines().map(Result::unwrap);
    let mut told = lines.by_ref().filter(|line| line.contains("another process fetches"));
    told.find(|line| line.contains("of 21.0 MB")).expect("the progress of the other is shown");
    let rest = thread::spawn(move || lines.for_each(drop));
    bench.hub.go_on();
    check(&bench, [first].into_iter().chain(others).chain([waiting]).collect());
    rest.join().unwrap();
}

#[test]
fn fault_39_a_killed_owner_is_followed_by_one_of_those_who_wait() {
    let bench = Bench::new();
    bench.hub.behave(|asked| if asked.of_cdn { Answer::Pause(4 << 20) } else { Answer::Right });
    let mut owner = bench.start(&[]);
    bench.wait_for_bytes(12 << 20);
    let waiters: Vec<_> = (0..4).map(|_| bench.start(&[])).collect();
    signal(&owner, libc::SIGKILL);
    owner.wait().unwrap();
    bench.hub.behave(|_| Answer::Right);
    bench.hub.go_on();
    for waiter in waiters {
        finish(waiter).output();
    }
    bench.check_complete(&bench.files());
}

#[test]
fn fault_40_a_paused_owner_notices_that_it_was_followed() {
    let bench = Bench::new();
    bench.hub.behave(|asked| if asked.of_cdn { Answer::Pause(2 << 20) } else { Answer::Right });
    let owner = bench.start(&[("HUB_STALE_SECONDS", "0.5")]);
    bench.wait_for_bytes(6 << 20);
    signal(&owner, libc::SIGSTOP);
    bench.hub.behave(|_| Answer::Right);
    let follower = bench.start(&[("HUB_STALE_SECONDS", "0.5")]);
    let followed = finish(follower).output();
    assert!(followed["fetched_bytes"].as_u64().unwrap() > 0);
    bench.check_complete(&bench.files());
    signal(&owner, libc::SIGCONT);
    bench.hub.go_on();
    let outcome = finish(owner);
    outcome.output();
    assert!(outcome.stderr.contains("taken the download over"), "{}", outcome.stderr);
    bench.check_complete(&bench.files());
}
