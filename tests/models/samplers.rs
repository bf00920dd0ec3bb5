//! Parity: time steps, Euler rule, guidance. UniPC and DPM++ are in the golden files but InfiniteTalk never
//! runs them, and neither do we.

use candle_core::Tensor;
use talkie::pipeline::{Apg, Branch, Guidance, orthogonal};
use talkie::scheduler::{euler_step, timesteps};

use crate::support::{Component, check};

const TOLERANCE: f64 = 1e-4;

/// `s40_shift11` → (40, 11.0).
fn steps_and_shift(tag: &str) -> (usize, f64) {
    let (steps, shift) = tag.strip_prefix('s').and_then(|t| t.split_once("_shift")).expect("sN_shiftX");
    (steps.parse().expect("steps"), shift.parse().expect("shift"))
}

#[test]
fn samplers_and_guidance() {
    let component = Component::open("samplers");
    let config = component.config();
    let train = config["files"]["samplers.safetensors"]["num_train_timesteps"].as_f64().expect("timesteps");
    assert_eq!(train, f64::from(talkie::scheduler::NUM_TRAIN_TIMESTEPS));

    let io = component.file("samplers.safetensors");
    let (a, c, x_init) = (io.f32("traj.A"), io.f32("traj.C"), io.f32("traj.x_init"));
    // The golden's stand-in for a network: v(x, t) = A x + C cos(3 t / 1000).
    let velocity =
        |x: &Tensor, t: f32| ((&a * x)? + (&c * f64::from((3.0 * t / 1000.0).cos()))?)?.contiguous();
    for name in io.names() {
        if let Some(tag) = name.strip_prefix("euler.timesteps.") {
            let (steps, shift) = steps_and_shift(tag);
            let ours = Tensor::new(timesteps(steps, shift), x_init.device()).unwrap();
            check("scheduler", "f32", &name, &ours, &io.f32(&name), TOLERANCE);
        } else if let Some(tag) = name.strip_prefix("euler.traj.") {
            let (steps, shift) = steps_and_shift(tag);
            let mut trajectory = vec![x_init.clone()];
            for t in timesteps(steps, shift).windows(2) {
                let x = trajectory.last().unwrap();
                trajectory.push(euler_step(x, &velocity(x, t[0]).unwrap(), t[0], t[1]).unwrap());
            }
            let ours = Tensor::stack(&trajectory, 0).unwrap();
            check("scheduler", "f32", &name, &ours, &io.f32(&name), TOLERANCE);
        } else {
            let unused = ["unipc.", "dpmpp.", "traj."].iter().any(|p| name.starts_with(p));
            assert!(unused, "samplers.safetensors: what is `{name}`?");
            io.get(&name);
        }
    }

    let io = component.file("guidance.safetensors");
    let config = &config["files"]["guidance.safetensors"];
    let number = |v: &serde_json::Value| v.as_f64().expect("a number");
    let [cond, drop_text, uncond, drop_audio] =
        ["cond", "drop_text", "uncond", "drop_audio"].map(|name| io.f32(name));
    for case in config["cfg"].as_array().expect("cfg") {
        let name = case["name"].as_str().expect("name");
        let guidance = Guidance { text: number(&case["text"]), audio: number(&case["audio"]), apg: None };
        let output = |branch: &Branch| match branch {
            Branch::Cond => cond.clone(),
            Branch::DropText => drop_text.clone(),
            Branch::Uncond => uncond.clone(),
            Branch::DropAudio => drop_audio.clone(),
        };
        let outputs: Vec<_> = guidance.branches().iter().map(output).collect();
        let ours = guidance.start_window().combine(&outputs).unwrap();
        check("guidance", "f32", name, &ours, &io.f32(name), TOLERANCE);
    }

    let apg = &config["apg"];
    assert_eq!(number(&apg["eta"]), 0.0, "only the orthogonal part is kept");
    for threshold in apg["thresholds"].as_array().expect("thresholds") {
        let settings = Some(Apg { momentum: number(&apg["momentum"]), norm_threshold: number(threshold) });
        let (text, audio) = (number(&apg["three_pass_text_scale"]), number(&apg["three_pass_audio_scale"]));
        let mut three = Guidance { text, audio, apg: settings }.start_window();
        let audio = number(&apg["two_pass_audio_scale"]);
        let mut two = Guidance { text: 1.0, audio, apg: settings }.start_window();
        for (step, factor) in apg["diff_factor_per_step"].as_array().expect("factors").iter().enumerate() {
            // The golden scales each difference by `factor`; moving the branches apart does the same.
            let k = number(factor);
            let apart = |from: &Tensor, other: &Tensor, to: &Tensor| {
                (to - ((from - other).unwrap() * k).unwrap()).unwrap()
            };
            let dt = apart(&cond, &drop_text, &cond);
            let u = apart(&drop_text, &uncond, &dt);
            let da = apart(&cond, &drop_audio, &cond);
            // The same number may be spelled 20, 20.0 or 2e1.
            let spelled = |name: &String| {
                let (value, rest) = name.strip_prefix("apg.thr")?.split_once(".step")?;
                (value.parse() == Ok(number(threshold))).then(|| format!("apg.thr{value}.step{}", rest))
            };
            let wanted = format!(".step{step}.three_pass");
            let names = io.names();
            let name = names.iter().filter(|name| name.ends_with(&wanted)).find_map(spelled);
            let prefix = name.expect("a result at this threshold and step").replace(".three_pass", "");
            for (name, ours) in [
                (format!("{prefix}.three_pass"), three.combine(&[cond.clone(), dt, u]).unwrap()),
                (format!("{prefix}.two_pass"), two.combine(&[cond.clone(), da]).unwrap()),
            ] {
                check("guidance", "f32", &name, &ours, &io.f32(&name), TOLERANCE);
            }
        }
    }

    // `project` splits a difference into its parts along and across the conditional output.
    let diff = (io.f32("project.parallel") + io.f32("project.orthogonal")).unwrap();
    let ours = orthogonal(&diff, &cond).unwrap();
    check("guidance", "f32", "project.orthogonal", &ours, &io.f32("project.orthogonal"), TOLERANCE);
    let along = (&diff - &ours).unwrap();
    check("guidance", "f32", "project.parallel", &along, &io.f32("project.parallel"), TOLERANCE);

    component.finish();
}

#[test]
fn a_wrong_shift_or_scale_is_noticed() {
    let component = Component::open("samplers");
    let io = component.file("samplers.safetensors");
    let names = io.names();
    let schedules =
        names.iter().filter_map(|n| Some((n, steps_and_shift(n.strip_prefix("euler.timesteps.")?))));
    let (name, (steps, shift)) = schedules.max_by_key(|(_, (steps, _))| *steps).expect("a schedule");
    let ours = Tensor::new(timesteps(steps, shift * 1.1), &candle_core::Device::Cpu).unwrap();
    assert!(crate::support::relative_error(&ours, &io.f32(name)) > TOLERANCE);
}
