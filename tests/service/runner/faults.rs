//! What goes wrong while a video is computed: jobs whose prompt says so, in a process that obeys.

use serde_json::{Value, json};

use super::{input, with};
use crate::lambda::Function;

fn job(prompt: &str) -> Value {
    with(&input(), &json!({"prompt": prompt, "output": {"inline": true}}))
}

fn code(outcome: Result<Value, (String, Value)>) -> String {
    outcome.unwrap_err().0
}

#[test]
fn fault_56_what_720p_has_no_memory_for_is_made_at_480p_once() {
    let mut function = Function::start(&[]);
    let large = |prompt, strict| with(&job(prompt), &json!({"size": "720p", "strict": strict}));
    let output = function.invoke(&large("fault: oom at 720p", false)).unwrap();
    assert!(output["downgrades"][0].as_str().unwrap().contains("480p"), "{output}");
    assert_eq!(code(function.invoke(&large("fault: oom at 720p", true))), "GPU_OUT_OF_MEMORY");
    let (kind, error) = function.invoke(&large("fault: oom", false)).unwrap_err();
    assert_eq!((kind.as_str(), &error["retryable"]), ("GPU_OUT_OF_MEMORY", &json!(true)), "twice is enough");
    assert_eq!(code(function.invoke(&job("fault: oom"))), "GPU_OUT_OF_MEMORY");
    assert!(function.invoke(&job("fault: instant")).is_ok());
}

#[test]
fn fault_56_what_runs_out_of_memory_at_480p_is_made_once_more_with_fewer_weights_there() {
    let mut function = Function::start(&[]);
    let strict = with(&job("fault: oom once"), &json!({"strict": true}));
    assert_eq!(code(function.invoke(&strict)), "GPU_OUT_OF_MEMORY");
    let mut function = Function::start(&[]);
    let output = function.invoke(&job("fault: oom once")).unwrap();
    let downgrades = output["downgrades"].as_array().unwrap();
    assert_eq!(downgrades.len(), 1, "{output}");
    assert!(downgrades[0].as_str().unwrap().starts_with("memory:"), "{output}");
    let output = function.invoke(&job("fault: oom once")).unwrap();
    assert_eq!(output["downgrades"], json!([]), "it was once");
}

#[test]
fn fault_57_a_device_that_is_broken_takes_no_further_job() {
    let mut function = Function::start(&[]);
    let (kind, error) = function.invoke(&job("fault: sticky")).unwrap_err();
    assert_eq!((kind.as_str(), &error["retryable"]), ("GPU_UNAVAILABLE", &json!(true)));
    assert_eq!(error["details"]["reason"], "DEVICE_BROKEN");
    assert_eq!(function.exit_code(), Some(1), "only a new process has a sound device");
}

#[test]
fn fault_59_a_generation_that_hangs_is_given_up() {
    let mut function = Function::start(&[("HANG_SECONDS", "0.5")]);
    let (kind, error) = function.invoke(&job("fault: hang")).unwrap_err();
    assert_eq!((kind.as_str(), &error["retryable"]), ("WORKER_LOST", &json!(true)), "{error}");
    assert!(error["message"].as_str().unwrap().contains("hangs"), "{error}");
    assert_eq!(function.exit_code(), Some(1));
}

#[test]
fn fault_60_values_that_are_not_finite_are_an_error_and_no_video() {
    let mut function = Function::start(&[]);
    assert_eq!(code(function.invoke(&job("fault: nan"))), "NUMERIC_FAILURE");
    assert_eq!(function.spooled("videos"), 0);
}

#[test]
fn fault_80_a_panic_is_the_failure_of_its_job() {
    let mut function = Function::start(&[]);
    let before = function.invoke(&job("a prompt")).unwrap();
    assert_eq!(code(function.invoke(&job("fault: panic"))), "INTERNAL");
    assert_eq!(function.spooled("videos"), 0);
    let after = function.invoke(&with(&job("a prompt"), &json!({"seed": before["seed"]}))).unwrap();
    assert_eq!(after["sha256"], before["sha256"], "the process goes on");
}

#[test]
fn steps_are_made_and_prompts_are_obeyed_only_where_they_are_meant_to_be() {
    let mut obeys = Function::start(&[]);
    assert_eq!(obeys.invoke(&job("fault: steps 3")).unwrap()["frames"], 5);
    let mut other = Function::start(&[("FAULTS_FROM_PROMPT", "0")]);
    assert_eq!(other.invoke(&job("fault: panic")).unwrap()["frames"], 8, "a prompt like any other");
}
