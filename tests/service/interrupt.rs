//! Ctrl-C: whatever it meets, no half file stays under the final name.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStderr, Stdio};

use crate::media;
use crate::support::{Bench, read};

/// A generation that would take minutes.
struct Running {
    child: Child,
    stderr: BufReader<ChildStderr>,
}

impl Running {
    /// Starts it, and returns once it has reported `percent` or more.
    fn start(bench: &Bench, percent: u32) -> Self {
        bench.write("long.wav", &media::tone(16_000, 1, 60.0));
        let mut command =
            bench.generate(&["--image", "portrait.png", "--audio", "long.wav", "--steps", "100"]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let mut running = Self { child, stderr };
        running.read_until(|line| {
            let at = line.split_once('%').and_then(|(percent, _)| percent.trim().parse::<u32>().ok());
            at.is_some_and(|at| at >= percent)
        });
        running
    }

    /// Reads standard error up to a line that `is_it`.
    fn read_until(&mut self, is_it: impl Fn(&str) -> bool) {
        let mut line = String::new();
        while !is_it(&line) {
            line.clear();
            assert_ne!(self.stderr.read_line(&mut line).unwrap(), 0, "it ended early");
        }
    }

    fn interrupt(&self) {
        // SAFETY: `kill` takes two integers; the process is our child and was not waited for, so that its id is
        // its own. The standard library can only send SIGKILL.
        let sent = unsafe { libc::kill(self.child.id() as libc::pid_t, libc::SIGINT) };
        assert_eq!(sent, 0);
    }

    /// The exit code, and what was left on standard error.
    fn end(&mut self) -> (Option<i32>, String) {
        let mut rest = String::new();
        self.stderr.read_to_string(&mut rest).unwrap();
        (self.child.wait().unwrap().code(), rest)
    }
}

/// A test that fails does not leave a process behind.
impl Drop for Running {
    fn drop(&mut self) {
        // Both fail when it has ended and was waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn an_interrupted_generation_leaves_the_former_video() {
    let bench = Bench::new();
    bench.write("out.mp4", b"former");
    // Past 8 % the windows are being denoised.
    let mut running = Running::start(&bench, 8);
    running.interrupt();
    let (code, rest) = running.end();
    assert_eq!(code, Some(1));
    assert!(rest.lines().last().is_some_and(|line| line.contains("\"CANCELLED\"")), "{rest}");
    assert_eq!(read(&bench.path("out.mp4")), b"former");
    assert_eq!(bench.names(), ["long.wav", "out.mp4", "portrait.png", "voice.wav"]);
}

#[test]
fn a_second_interrupt_ends_it_at_once() {
    let bench = Bench::new();
    let mut running = Running::start(&bench, 0);
    running.interrupt();
    // Signals of one kind do not queue: the second is sent when the first was answered.
    running.read_until(|line| line.contains("Ctrl-C"));
    running.interrupt();
    assert_eq!(running.end().0, Some(1));
    assert_eq!(bench.names(), ["long.wav", "portrait.png", "voice.wav"]);
}
