//! The page at `/`, in a real Chromium.

use std::path::{Path, PathBuf};

use tempfile::{TempDir, tempdir};

use super::webdriver::{Browser, ENTER, TAB};
use super::{KEY, chromedriver};
use crate::media;
use crate::pool::gateway::Gateway;

/// A gateway, a browser at its page, and files to choose.
struct Desk {
    // Dropped first: the browser before the gateway before the folder.
    browser: Browser,
    gateway: Gateway,
    dir: TempDir,
}

impl Desk {
    fn open(chromedriver: &Path, variables: &[(&str, &str)]) -> Self {
        let dir = tempdir().unwrap();
        let gateway = Gateway::start(&dir.path().join("data"), variables);
        let browser = Browser::open(chromedriver, dir.path(), 1000);
        let desk = Self { browser, gateway, dir };
        desk.write("portrait.png", &media::png(96, 96));
        desk.write("voice.wav", &media::tone(16_000, 1, 2.0));
        desk.browser.visit(&format!("{}/", desk.gateway.base));
        desk
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    fn choose(&self, input: &str, name: &str) {
        self.browser.keys(input, self.dir.path().join(name).to_str().unwrap());
    }

    fn choose_both(&self) {
        self.choose("#image", "portrait.png");
        self.choose("#audio", "voice.wav");
    }

    /// Sends what is chosen, with a prompt that tells the worker what to do. The new job's id.
    fn submit(&self, prompt: &str) -> String {
        let shown = "document.querySelector('#job-id').textContent";
        let before: String = self.browser.run(&format!(
            "document.querySelector('details').open = true;
             document.querySelector('#prompt').value = '';
             return {shown}"
        ));
        self.browser.keys("#prompt", prompt);
        self.browser.keys("#submit", ENTER);
        self.browser.until(&format!("return {shown} !== '{before}'"));
        self.browser.run(&format!("return {shown}"))
    }

    /// Waits until the page says so of the job.
    #[track_caller]
    fn says(&self, state: &str) {
        self.browser.until(&format!("return document.querySelector('#job-state').textContent === '{state}'"));
    }

    /// Whether an element can be seen.
    fn shows(&self, id: &str) -> bool {
        self.browser.run(&format!("return document.getElementById('{id}').checkVisibility()"))
    }

    /// Checks that everything came from the gateway and that the page broke no rule.
    #[track_caller]
    fn was_clean(&self) {
        let base = &self.gateway.base;
        let asked: Vec<String> =
            self.browser.run("return performance.getEntriesByType('resource').map((entry) => entry.name)");
        let strangers: Vec<_> =
            asked.iter().filter(|url| !url.starts_with(base) && !url.starts_with("blob:")).collect();
        assert!(strangers.is_empty() && asked.len() > 3, "{asked:?}");
        assert_eq!(self.browser.log(), [""; 0]);
    }
}

/// Notes every value of the progress bar and every state that the page says.
const WATCH: &str = "
    window.seen = { values: [], states: [] };
    const note = () => {
        const bar = document.querySelector('#bar'), state = document.querySelector('#job-state').textContent;
        if (bar.hasAttribute('value')) seen.values.push(bar.value);
        if (state && seen.states.at(-1) !== state) seen.states.push(state);
    };
    new MutationObserver(note).observe(document.querySelector('#job'),
        { subtree: true, attributes: true, childList: true, characterData: true });";

#[test]
fn a_video_is_made_watched_and_played_and_another_is_cancelled() {
    let Some(chromedriver) = chromedriver() else { return };
    let desk = Desk::open(&chromedriver, &[]);
    let Desk { browser, gateway, .. } = &desk;

    browser.run::<()>(WATCH);
    desk.choose_both();
    browser.until("return document.querySelector('.drop img').naturalWidth === 96");
    desk.submit("hello");
    desk.says("Ready");
    let values: Vec<f64> = browser.run("return seen.values");
    let states: Vec<String> = browser.run("return seen.states");
    assert!(values.iter().any(|value| (1.0..99.0).contains(value)), "{values:?}");
    assert!(values.is_sorted(), "{values:?}");
    assert!(states.iter().any(|state| state == "Drawing the video"), "{states:?}");

    // The window has no speaker; without sound it may start by itself.
    browser.run::<()>("const video = document.querySelector('video'); video.muted = true; video.play()");
    browser.until("return document.querySelector('video').currentTime > 0.2");
    let (width, seconds): (f64, f64) = browser
        .run("const video = document.querySelector('video'); return [video.videoWidth, video.duration]");
    assert!(width >= 64.0 && (seconds - 2.0).abs() < 0.1, "{width} pixels, {seconds} s");
    assert!(desk.shows("download") && !desk.shows("cancel") && !desk.shows("bar"));

    browser.click("#again");
    let first = desk.submit("fault: wait");
    desk.says("Drawing the video");
    // One more waits behind it.
    browser.click("#again");
    let second = desk.submit("hello");
    desk.says("Next in line");
    browser.click("#cancel");
    desk.says("Cancelled");
    browser.run::<()>(&format!("location.hash = '{first}'"));
    desk.says("Drawing the video");
    browser.click("#cancel");
    desk.says("Cancelled");
    for job in [&first, &second] {
        assert_eq!(gateway.status(job)["status"], "CANCELLED");
    }

    // The list knows them after a reload, and leads back to the video.
    browser.run::<()>("history.replaceState(null, '', '/'); location.reload()");
    browser.until("return document.querySelectorAll('#jobs li').length === 3");
    let listed: Vec<String> = browser
        .run("return [...document.querySelectorAll('#jobs .state')].map((state) => state.textContent)");
    assert_eq!(listed, ["Cancelled", "Cancelled", "Ready"]);
    browser.click("#jobs li:last-child a");
    desk.says("Ready");
    browser.until("return document.querySelector('video').readyState > 0");
    desk.was_clean();
}

#[test]
fn what_goes_wrong_is_said_in_words() {
    let Some(chromedriver) = chromedriver() else { return };
    let limits = [("MAX_IMAGE_BYTES", "2000000"), ("MAX_RUN_BYTES", "3000000")];
    let desk = Desk::open(&chromedriver, &[&[("MAX_WORKERS", "0")], &limits[..]].concat());
    let browser = &desk.browser;
    let note: String = browser.run("return document.querySelector('#image-note').textContent");
    assert!(note.ends_with("up to 2.0 MB"), "{note}");
    let said = || browser.run::<String>("return document.querySelector('#form-error').innerText");

    browser.keys("#submit", ENTER);
    assert_eq!(said(), "Choose a portrait first.");
    assert_eq!(browser.run::<String>("return document.activeElement.id"), "image");
    desk.choose_both();
    desk.write("huge.png", &vec![0; 2_500_000]);
    desk.choose("#image", "huge.png");
    assert_eq!(said(), "The portrait has 2.5 MB; up to 2.0 MB can be used.");
    desk.write("long.wav", &vec![0; 2_500_000]);
    desk.choose("#image", "portrait.png");
    desk.choose("#audio", "long.wav");
    assert!(said().starts_with("Portrait and voice have 2.5 MB together"), "{}", said());
    browser.keys("#submit", ENTER);
    assert_eq!(desk.gateway.health()["jobs"]["inQueue"], 0, "it was not sent");

    // What only the gateway can tell.
    desk.write("not-an-image.png", b"hello");
    desk.choose("#image", "not-an-image.png");
    desk.choose("#audio", "voice.wav");
    browser.keys("#submit", ENTER);
    browser
        .until("return document.querySelector('#form-error').innerText.includes('(INVALID_IMAGE_FORMAT)')");
    assert!(!desk.shows("job"));

    browser.run::<()>("location.hash = 'no-such-job'");
    desk.says("This job is not known any more");
}

#[test]
fn the_page_asks_for_a_key_and_works_by_keyboard_and_on_a_phone() {
    let Some(chromedriver) = chromedriver() else { return };
    let desk = Desk::open(&chromedriver, &[("API_KEY", KEY)]);
    let browser = &desk.browser;
    browser.become_phone(360);

    // The field has the focus as soon as the gateway has refused.
    browser.until("return document.activeElement.id === 'key'");
    for key in KEY.chars().map(String::from).chain([ENTER.to_string()]) {
        browser.press(&key);
    }
    browser.until("return !document.querySelector('#key-form').checkVisibility()");

    desk.choose_both();
    let order: Vec<String> = std::iter::repeat_with(|| {
        browser.press(TAB);
        browser.run("const { id, tagName } = document.activeElement; return id || tagName")
    })
    .take(5)
    .collect();
    assert_eq!(order[..2], ["image", "audio"], "{order:?}");
    desk.submit("fault: steps 4");
    desk.says("Ready");
    let widths: (u32, u32) = browser.run("return [document.documentElement.scrollWidth, innerWidth]");
    assert_eq!(widths, (360, 360));
    assert!(desk.gateway.log().lines().all(|line| !line.contains(KEY)));
    // Every control has a name.
    let nameless: Vec<String> = browser.run(
        "return [...document.querySelectorAll('input, select, textarea, button, a, video, audio, progress')]
            .filter((e) => e.checkVisibility() && !(e.labels?.length || e.textContent.trim() || e.ariaLabel
                || e.getAttribute('aria-labelledby'))).map((e) => e.outerHTML)",
    );
    assert_eq!(nameless, [""; 0]);
    // The refusals before the key are the browser's own lines.
    assert!(browser.log().iter().all(|line| line.contains("401")), "{:?}", browser.log());
}
