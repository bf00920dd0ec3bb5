//! Deleting what has expired.

use std::collections::BTreeSet;
use std::path::PathBuf;

use aws_sdk_s3::primitives::ByteStream;
use handler::storage::Extent;
use handler::storage::embedded::BUCKET;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc2822;

use super::world::{Fault, World, quick};

fn now() -> i64 {
    OffsetDateTime::now_utc().unix_timestamp()
}

/// A key as ours are, that is due in `seconds`.
pub fn key(prefix: &str, seconds: i64, number: usize) -> String {
    format!("{prefix}/e={}/job-{number:022}.mp4", now() + seconds)
}

pub async fn put(world: &World, key: &str) {
    let call = world.raw().put_object().bucket(BUCKET).key(key);
    call.body(ByteStream::from_static(b"x")).send().await.unwrap_or_else(|e| panic!("{key}: {e:?}"));
}

async fn all_keys(world: &World) -> BTreeSet<String> {
    let (mut keys, mut token) = (BTreeSet::new(), None);
    loop {
        let page =
            world.raw().list_objects_v2().bucket(BUCKET).set_continuation_token(token).send().await.unwrap();
        keys.extend(page.contents().iter().map(|object| object.key().unwrap().to_string()));
        token = page.next_continuation_token().map(str::to_string);
        if token.is_none() {
            return keys;
        }
    }
}

/// Ours and strangers', due and not, in random order and number.
#[tokio::test(flavor = "multi_thread")]
async fn fault_73_only_what_is_ours_and_due_goes() {
    let world = World::new().await;
    let mut rng = StdRng::seed_from_u64(3);
    let (mut due, mut kept) = (BTreeSet::new(), BTreeSet::new());
    for number in 0..120 {
        let prefix = ["videos", "clients/a", "clients/b-1", "z"][rng.random_range(0..4)];
        let past = -rng.random_range(1..100_000_000);
        let (key, goes) = match rng.random_range(0..6) {
            0 | 1 => (key(prefix, past, number), true),
            2 => (key(prefix, past, number).replace(".mp4", ".json"), true),
            3 => (key(prefix, rng.random_range(60..100_000), number), false),
            // Whoever wrote these, it was not us.
            4 => (key(prefix, past, number).replace("job-0", "job_0"), false),
            _ => (format!("{prefix}/e={}/notes-{number}.txt", now() + past), false),
        };
        put(&world, &key).await;
        let set = if goes { &mut due } else { &mut kept };
        set.insert(key);
    }
    for foreign in ["backup.tar", "videos/e=1/x", "e=1700000000/a-0000000000000000000000.mp4"] {
        put(&world, foreign).await;
        kept.insert(foreign.to_string());
    }
    let dry = world.storage.sweep(Extent { dry_run: true, ..Extent::FULL }).await.unwrap();
    assert_eq!(dry.into_iter().collect::<BTreeSet<_>>(), due);
    assert_eq!(all_keys(&world).await.len(), due.len() + kept.len(), "nothing is deleted to try");
    let deleted = world.storage.sweep(Extent::FULL).await.unwrap();
    assert_eq!(deleted.into_iter().collect::<BTreeSet<_>>(), due);
    assert_eq!(all_keys(&world).await, kept);
    assert_eq!(world.storage.sweep(Extent::FULL).await.unwrap(), Vec::<String>::new());
}

/// Makes `count` objects of one, without writing each.
fn multiply(world: &World, key: &str, count: usize) {
    let (folder, name) = key.rsplit_once('/').unwrap();
    let mut path: PathBuf = world.dir.path().join("objects/data");
    path.extend(folder.split('/').map(|segment| format!("d-{segment}")));
    let first = path.join(format!("f-{name}"));
    for number in 1..count {
        let name = format!("f-job-{number:022}.mp4");
        std::fs::hard_link(&first, path.join(name)).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_73_ten_thousand_objects_crashes_and_company() {
    let world = World::new().await;
    let (due, live) = (key("videos", -1000, 0), key("videos", 1000, 0));
    for key in [&due, &live] {
        put(&world, key).await;
    }
    multiply(&world, &due, 10_000);
    multiply(&world, &live, 50);
    assert_eq!(world.storage.sweep(Extent::SMALL).await.unwrap().len(), 100, "a small sweep ends");
    assert!(world.count("list") <= 2, "one list for the prefixes, one for the keys");
    // Cut off in the middle of a page, as by kill -9.
    for _ in 0..3 {
        tokio::select! {
            _ = world.storage.sweep(Extent::FULL) => panic!("it takes longer"),
            () = async { for _ in 0..20 { world.next("delete").await; } } => {}
        }
    }
    // Two at once get in each other's way without harm.
    let (one, other) = tokio::join!(world.storage.sweep(Extent::FULL), world.storage.sweep(Extent::FULL));
    assert!(one.unwrap().len() + other.unwrap().len() >= 9_000);
    let left = all_keys(&world).await;
    assert!(
        left.len() == 50 && left.iter().all(|key| key.contains(live.split('/').nth(1).unwrap())),
        "{}",
        left.len()
    );
}

/// What a clock that is wrong takes for expired is not, and the other way round: the store's time counts.
#[tokio::test(flavor = "multi_thread")]
async fn fault_73_the_stores_clock_counts() {
    for (skew, deleted) in [(-86_400, 0), (0, 1), (86_400, 2)] {
        let date = (OffsetDateTime::now_utc() + time::Duration::seconds(skew)).format(&Rfc2822).unwrap();
        let date = date.replace("+0000", "GMT");
        let world = World::with(quick(), move |seen, _| match seen.operation {
            "list" => Fault::Date(date.clone()),
            _ => Fault::None,
        })
        .await;
        for seconds in [-60, 60] {
            put(&world, &key("videos", seconds, 0)).await;
        }
        // The SDK signs by the store's clock too; the real one behind the wire would refuse that.
        let found = world.storage.sweep(Extent { dry_run: true, pages: 0, ..Extent::FULL }).await.unwrap();
        assert_eq!(found.len(), deleted, "{skew}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_73_what_is_already_gone_is_no_error_and_what_fails_is_tried_again() {
    for fault in [Fault::error(404, "NoSuchKey"), Fault::error(503, "SlowDown"), Fault::Cut] {
        let gone = matches!(fault, Fault::Answer(404, ..));
        let world =
            World::with(quick(), move |seen, before| match seen.operation == "delete" && before < 1 {
                true => fault.clone(),
                false => Fault::None,
            })
            .await;
        put(&world, &key("videos", -60, 0)).await;
        assert_eq!(world.storage.sweep(Extent::FULL).await.unwrap().len(), 1);
        assert_eq!(world.keys().await.len(), usize::from(gone), "the 404 was the wire's own");
    }
    let world = World::with(quick(), |seen, _| match seen.operation {
        "delete" => Fault::error(403, "AccessDenied"),
        _ => Fault::None,
    })
    .await;
    put(&world, &key("videos", -60, 0)).await;
    let error = world.storage.sweep(Extent::FULL).await.unwrap_err();
    assert!(error.message.contains("AccessDenied") && !error.retryable, "{error:?}");
}
