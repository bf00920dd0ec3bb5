//! Chromium by remote control: a small client of the W3C's WebDriver protocol.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Stdio};
use std::thread;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::command;
use crate::pool::gateway::within;

/// How long the page may take for anything.
const PATIENCE: Duration = Duration::from_secs(60);
/// Under which an element's id is answered.
const ELEMENT: &str = "element-6066-11e4-a52e-4f735466cecf";
/// Presses the Enter key.
pub const ENTER: &str = "\u{E007}";
/// Presses the tabulator key.
pub const TAB: &str = "\u{E004}";

/// A browser window. It ends with this value.
pub struct Browser {
    driver: Child,
    host: String,
    session: String,
}

impl Browser {
    /// Opens a window of `width` pixels, with a profile below `home`.
    pub fn open(chromedriver: &Path, home: &Path, width: u32) -> Self {
        let mut driver = command(chromedriver, home);
        driver.arg("--port=0").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut driver = driver.spawn().unwrap();
        let mut lines = BufReader::new(driver.stdout.take().unwrap()).lines().map(Result::unwrap);
        let started = lines.find_map(|line| Some(line.split_once("successfully on port ")?.1.to_string()));
        let port = started.expect("ChromeDriver says its port");
        let host = format!("127.0.0.1:{}", port.trim_end_matches('.'));
        // A full pipe must not hold the driver up.
        thread::spawn(move || lines.for_each(drop));
        let mut browser = Self { driver, host, session: String::new() };
        // A service of the system's own makes no sandbox inside of containers; the page is ours. It must reach nobody.
        let args = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--autoplay-policy=no-user-gesture-required",
            &format!("--user-data-dir={}", home.join("profile").display()),
            &format!("--window-size={width},900"),
        ];
        let options = json!({"goog:chromeOptions": {"args": args}, "goog:loggingPrefs": {"browser": "ALL"}});
        let made = browser.ask("POST", "/session", &json!({"capabilities": {"alwaysMatch": options}}));
        browser.session = format!("/session/{}", made["sessionId"].as_str().unwrap());
        browser
    }

    #[track_caller]
    fn ask(&self, method: &str, path: &str, body: &Value) -> Value {
        let path = format!("{}{path}", self.session);
        let body = if method == "GET" { String::new() } else { body.to_string() };
        let answer = exchange(&self.host, (method, &path), &body);
        let mut answer = answer.unwrap_or_else(|e| panic!("{method} {path}: {e}"));
        assert!(answer["value"].get("error").is_none(), "{method} {path}: {answer}");
        answer["value"].take()
    }

    /// Opens an address.
    pub fn visit(&self, url: &str) {
        self.ask("POST", "/url", &json!({"url": url}));
    }

    /// Types into the element that `selector` finds; into a file input, a path.
    #[track_caller]
    pub fn keys(&self, selector: &str, text: &str) {
        let found = self.ask("POST", "/element", &json!({"using": "css selector", "value": selector}));
        let id = found[ELEMENT].as_str().unwrap();
        self.ask("POST", &format!("/element/{id}/value"), &json!({"text": text}));
    }

    /// Types into whatever has the focus.
    #[track_caller]
    pub fn press(&self, key: &str) {
        let actions = json!([{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]);
        self.ask(
            "POST",
            "/actions",
            &json!({"actions": [{"type": "key", "id": "keys", "actions": actions}]}),
        );
    }

    #[track_caller]
    pub fn click(&self, selector: &str) {
        let found = self.ask("POST", "/element", &json!({"using": "css selector", "value": selector}));
        self.ask("POST", &format!("/element/{}/click", found[ELEMENT].as_str().unwrap()), &json!({}));
    }

    /// What a function with this body returns.
    #[track_caller]
    pub fn run<T: DeserializeOwned>(&self, body: &str) -> T {
        let value = self.ask("POST", "/execute/sync", &json!({"script": body, "args": []}));
        serde_json::from_value(value).unwrap()
    }

    /// Waits until the function with this body returns something true.
    #[track_caller]
    pub fn until(&self, body: &str) {
        let seen = || self.run::<String>("return document.body.innerText");
        within(PATIENCE, || self.run::<bool>(body).then_some(()))
            .unwrap_or_else(|| panic!("in vain: {body}\n{}\n{:?}", seen(), self.log()));
    }

    /// What the console has got since the last call: errors, and what the page's policy forbids.
    pub fn log(&self) -> Vec<String> {
        let lines = self.ask("POST", "/se/log", &json!({"type": "browser"}));
        lines.as_array().unwrap().iter().map(|line| line["message"].to_string()).collect()
    }

    /// Makes the window that of a phone of `width` pixels.
    pub fn become_phone(&self, width: u32) {
        let screen = json!({"width": width, "height": 740, "deviceScaleFactor": 2, "mobile": true});
        let command = json!({"cmd": "Emulation.setDeviceMetricsOverride", "params": screen});
        self.ask("POST", "/goog/cdp/execute", &command);
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        if !self.session.is_empty() {
            let _ = exchange(&self.host, ("DELETE", &self.session), "");
        }
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

/// One request to the driver, which keeps connections open whatever is asked of it: the answer ends by its length.
fn exchange(host: &str, (method, path): (&str, &str), body: &str) -> io::Result<Value> {
    let mut stream = TcpStream::connect(host)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let length = body.len();
    let kind = "application/json; charset=utf-8";
    write!(stream, "{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\n")?;
    write!(stream, "Content-Length: {length}\r\n\r\n{body}")?;
    let mut answer = BufReader::new(stream);
    let (mut line, mut length) = (String::new(), 0);
    while answer.read_line(&mut line)? > 2 {
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse().map_err(io::Error::other)?;
        }
        line.clear();
    }
    let mut content = vec![0; length];
    answer.read_exact(&mut content)?;
    serde_json::from_slice(&content).map_err(io::Error::other)
}
