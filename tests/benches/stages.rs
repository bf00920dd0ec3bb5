//! `cargo bench`: the stages of `handler bench` under criterion, which keeps earlier results and shows changes.
//!
//! `cargo bench -- real_` runs those whose name contains `real_`.

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use handler::bench::{self, Cut};
use talkie::device::{self, Preference};
use talkie::registry::Registry;

/// The fewest samples that criterion takes; a stage lasts up to some seconds.
const SAMPLES: usize = 10;

fn stages(criterion: &mut Criterion) {
    handler::memory::keep_freed();
    let device = device::select(Preference::Auto, |_| ()).expect("there always is a CPU");
    let registry = Registry::built_in().expect("the built-in registry is valid");
    let model = registry.model("tiny").expect("the tiny model is built in");
    let mut group = criterion.benchmark_group("tiny");
    group.sample_size(SAMPLES).warm_up_time(Duration::from_millis(500));
    let stages = bench::stages(model, &device, Cut::default()).expect("the tiny model has a default size");
    for stage in stages {
        // Networks are built by the first call, so that a stage that is filtered out costs nothing.
        let mut run = None;
        group.bench_function(BenchmarkId::new(stage.name, stage.shape()), |bencher| {
            let run =
                run.get_or_insert_with(|| stage.prepare(&device).expect("random weights fit their network"));
            bencher.iter(|| {
                run().expect("a stage runs");
                device.synchronize().expect("the device finishes");
            });
        });
    }
    group.finish();
}

criterion_group!(benches, stages);
criterion_main!(benches);
