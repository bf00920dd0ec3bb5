//! A pipeline keeps its networks, shares them between models, and makes room where memory asks for it.

use std::fs;

use candle_core::Device;
use talkie::ErrorKind;
use talkie::device::Processor;
use talkie::pipeline::{Cancel, Pipeline, Stage, Weights};
use talkie::prepared::NetworkKind;
use talkie::registry::{ModelSpec, ModelStorage, Source};

use crate::studio;

/// Bytes that were read for a video; `None` where nothing was loaded.
fn bytes_read(made: &studio::Made) -> Option<u64> {
    made.video.as_ref().unwrap().loading.as_ref().map(|loading| loading.stats.bytes_read)
}

/// The bytes of tensors in a safetensors file.
fn data_bytes(source: &Source, storage: &ModelStorage) -> u64 {
    let file = fs::read(studio::weights_file(source, storage)).unwrap();
    let header = u64::from_le_bytes(file[..8].try_into().unwrap());
    file.len() as u64 - 8 - header
}

fn sources(spec: &ModelSpec) -> [&Source; 5] {
    let ModelSpec { dit, vae, text_encoder, image_encoder, audio_encoder, .. } = spec;
    [&audio_encoder.source, &text_encoder.source, &image_encoder.source, &vae.source, &dit.source]
}

/// `tiny` from files, and the same with another DiT.
fn two_models(dir: &std::path::Path) -> (ModelSpec, ModelSpec, ModelStorage) {
    let (first, storage) = studio::on_disk(&studio::tiny(), &dir.join("models"));
    let mut drawn = studio::tiny();
    drawn.dit.source = Source::Random(43);
    let (mut second, others) = studio::on_disk(&drawn, &dir.join("others"));
    second.name = "second".into();
    let Source::Files(repos) = &mut second.dit.source else { panic!("files") };
    let from = studio::weights_file(&Source::Files(repos.clone()), &others);
    repos[0].repo = "test/second".into();
    let to = studio::weights_file(&second.dit.source, &storage);
    fs::create_dir_all(to.parent().unwrap()).unwrap();
    fs::rename(from, to).unwrap();
    (first, second, storage)
}

#[test]
fn a_second_video_reads_nothing_and_another_model_only_what_differs() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second, storage) = two_models(dir.path());
    let mut pipeline = Pipeline::new(Device::Cpu, None);
    let cold = studio::make(&mut pipeline, &first, &storage);
    let all: u64 = sources(&first).into_iter().map(|source| data_bytes(source, &storage)).sum();
    assert_eq!(bytes_read(&cold), Some(all));
    let loading = cold.video.as_ref().unwrap().loading.as_ref().unwrap();
    assert!(
        loading.wall >= loading.stats.wall.min(loading.wall) && !loading.stats.wall.is_zero(),
        "{loading:?}"
    );

    let other = studio::make(&mut pipeline, &second, &storage);
    assert_eq!(bytes_read(&other), Some(data_bytes(&second.dit.source, &storage)), "only its DiT");
    assert_ne!(other.bytes, cold.bytes);

    // What the weights are is known by their hashes, so files that are ruined are not noticed unless they are read.
    for source in sources(&first).into_iter().chain([&second.dit.source]) {
        fs::write(studio::weights_file(source, &storage), "ruined").unwrap();
    }
    for (spec, before) in [(&first, &cold), (&second, &other)] {
        let warm = studio::make(&mut pipeline, spec, &storage);
        assert_eq!(bytes_read(&warm), None);
        assert!(warm.bytes == before.bytes, "{}: another video", spec.name);
        assert!(warm.progress.iter().all(|report| report.stage != Stage::Load), "nothing is loaded");
    }
    assert_eq!(
        studio::make(&mut Pipeline::new(Device::Cpu, None), &first, &storage).video.unwrap_err().kind(),
        ErrorKind::ModelCorrupt,
        "a cold pipeline does read them"
    );
}

#[test]
fn where_there_is_no_room_for_both_the_one_used_less_recently_goes() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second, storage) = two_models(dir.path());
    let plan =
        studio::make(&mut Pipeline::new(Device::Cpu, None), &first, &storage).video.unwrap().plan.unwrap();
    let dit = data_bytes(&first.dit.source, &storage);
    // Room for one model and half of another DiT.
    let mut pipeline = Pipeline::new(Device::Cpu, Some(plan.device_bytes + dit / 2));
    let read: Vec<_> = [&first, &second, &second, &first]
        .map(|spec| bytes_read(&studio::make(&mut pipeline, spec, &storage)).unwrap_or(0))
        .into();
    let second_dit = data_bytes(&second.dit.source, &storage);
    let all: u64 = sources(&first).into_iter().map(|source| data_bytes(source, &storage)).sum();
    assert_eq!(read, [all, second_dit, 0, dit]);
}

#[test]
fn networks_are_read_in_the_order_in_which_they_are_needed() {
    let dir = tempfile::tempdir().unwrap();
    let (spec, storage) = studio::on_disk(&studio::heavy(), dir.path());
    let made = studio::make(&mut Pipeline::new(Device::Cpu, None), &spec, &storage);
    let reports: Vec<_> = made.progress.iter().filter_map(|report| report.loading).collect();
    assert!(!reports.is_empty());
    let position = |kind| NetworkKind::ALL.iter().position(|other| *other == kind);
    assert!(reports.is_sorted_by_key(|report| position(report.network)), "{reports:?}");
    assert!(reports.is_sorted_by_key(|report| report.bytes_read), "{reports:?}");
    let last = reports.last().unwrap();
    assert_eq!((last.network, last.bytes_read), (NetworkKind::Dit, last.bytes_to_read));
    assert_eq!(made.progress.iter().rposition(|r| r.stage == Stage::Load).map(|i| i + 1), {
        made.progress.iter().position(|r| r.stage == Stage::Audio)
    });
    let all: u64 = sources(&spec).into_iter().map(|source| data_bytes(source, &storage)).sum();
    assert_eq!(last.bytes_to_read, all);
}

#[test]
fn a_cancelled_load_ends_and_what_was_read_stays() {
    let dir = tempfile::tempdir().unwrap();
    let (spec, storage) = studio::on_disk(&studio::heavy(), dir.path());
    let mut pipeline = Pipeline::new(Device::Cpu, None);
    let cancel = Cancel::default();
    let made = studio::make_with(&mut pipeline, &spec, &storage, &cancel, |report| {
        if report.loading.is_some_and(|loading| loading.network != NetworkKind::AudioEncoder) {
            cancel.cancel();
        }
    });
    assert_eq!(made.video.unwrap_err().kind(), ErrorKind::Cancelled);
    assert!(made.bytes.is_empty());
    let all = Weights::of(&spec, Processor::Cpu).unwrap().total();
    let again = studio::make(&mut pipeline, &spec, &storage);
    assert!(bytes_read(&again).is_some_and(|bytes| bytes < all), "the audio encoder was there");
}

#[test]
fn a_network_that_cannot_be_read_is_named_before_anything_is_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let (spec, storage) = studio::on_disk(&studio::tiny(), dir.path());
    let file = studio::weights_file(&spec.vae.source, &storage);
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
    let made = studio::make(&mut Pipeline::new(Device::Cpu, None), &spec, &storage);
    let error = made.video.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ModelCorrupt);
    assert!(error.to_string().contains("test/vae/model.safetensors"), "{error}");
    assert!(made.progress.is_empty(), "nothing was begun");
    fs::remove_file(&file).unwrap();
    let made = studio::make(&mut Pipeline::new(Device::Cpu, None), &spec, &storage);
    assert_eq!(made.video.unwrap_err().kind(), ErrorKind::ModelNotFound);
}
