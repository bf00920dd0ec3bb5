//! Fetches images and voices, with limits: on schemes, addresses, bytes and time.
//!
//! A request names addresses that this machine then visits, so nothing inside its own network may be
//! reachable that way. The host is judged three times: as a literal address in the URL and in each redirect,
//! in each answer of the resolver (one forbidden address condemns the name, so that a changing answer gains
//! nothing), and as the address that the answer came from.

use std::error::Error as StdError;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::redirect;
use reqwest::{Client, Response, Url};
use talkie::request::{Limits, Medium, redact_url};

use crate::faults::kill_point;
use crate::job::{Code, JobError};

/// Redirects that are followed.
const MAX_REDIRECTS: usize = 5;
/// Ports that web servers use; others belong to services that may take a request for a command.
const PORTS: [u16; 4] = [80, 443, 8080, 8443];
/// A server may be slow to start, and must then deliver this much a second.
const MIN_BYTES_PER_SECOND: u64 = 1024;
const SLOW_START: Duration = Duration::from_secs(5);

/// What may be fetched, and how long that may take.
#[derive(Clone, Copy, Debug)]
pub struct FetchPolicy {
    /// Bytes per file.
    pub limits: Limits,
    /// Allow addresses inside the network and any port; for development.
    pub allow_private: bool,
    /// For a connection, with its TLS handshake.
    pub connect_timeout: Duration,
    /// Between two pieces of an answer.
    pub idle_timeout: Duration,
    /// For one file, redirects included.
    pub total_timeout: Duration,
}

impl FetchPolicy {
    /// Public addresses only, 60 seconds a file.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            allow_private: false,
            connect_timeout: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(10),
            total_timeout: Duration::from_secs(60),
        }
    }
}

/// Fetches media under a [`FetchPolicy`].
#[derive(Debug)]
pub struct Fetcher {
    client: Client,
    policy: FetchPolicy,
}

impl Fetcher {
    /// A fetcher with its own connections.
    ///
    /// # Errors
    /// [`Code::Internal`] when TLS cannot be set up, as on a machine without root certificates.
    pub fn new(policy: FetchPolicy) -> Result<Self, JobError> {
        let allow_private = policy.allow_private;
        let follow = redirect::Policy::custom(move |attempt| {
            if attempt.previous().len() > MAX_REDIRECTS {
                return attempt.error(Refused(format!("is redirected more than {MAX_REDIRECTS} times")));
            }
            match check_url(attempt.url(), allow_private) {
                Ok(()) => attempt.follow(),
                Err(refused) => attempt.error(refused),
            }
        });
        Ok(Self { client: guarded_client(&policy, follow)?, policy })
    }

    /// Fetches the file at `url` for the field `name`.
    ///
    /// # Errors
    /// [`Code::UrlNotAllowed`], [`Code::DownloadFailed`], [`Code::ImageTooLarge`], [`Code::AudioTooLarge`].
    pub async fn fetch(&self, name: &str, medium: Medium, url: &str) -> Result<Vec<u8>, JobError> {
        let (shown, parsed) = (redact_url(url), parse_url(name, url, self.policy.allow_private)?);
        let started = Instant::now();
        let response = self.client.get(parsed).send().await.map_err(|e| failed(name, &shown, e))?;
        self.check_response(name, medium, &shown, &response)?;
        self.read_body(name, medium, &shown, response, started).await
    }

    fn check_response(
        &self,
        name: &str,
        medium: Medium,
        shown: &str,
        response: &Response,
    ) -> Result<(), JobError> {
        let from = response.remote_addr().map(|a| a.ip());
        if !self.policy.allow_private && !from.is_some_and(is_public) {
            return Err(not_allowed(name, shown, "was answered by an address that is not public"));
        }
        let status = response.status();
        if !status.is_success() {
            let retryable = status.is_server_error() || matches!(status.as_u16(), 408 | 429);
            let message = format!("`{name}` at {shown} was answered with {status}, expected 200");
            return Err(JobError::new(Code::DownloadFailed, message)
                .with_reason("URL_FETCH_FAILED")
                .with_detail("status", status.as_u16())
                .with_retryable(retryable));
        }
        if let Some(len) = response.content_length() {
            self.policy.limits.check(medium, name, len)?;
        }
        Ok(())
    }

    async fn read_body(
        &self,
        name: &str,
        medium: Medium,
        shown: &str,
        mut response: Response,
        started: Instant,
    ) -> Result<Vec<u8>, JobError> {
        let mut bytes = Vec::new();
        while let Some(piece) = response.chunk().await.map_err(|e| failed(name, shown, e))? {
            let len = (bytes.len() + piece.len()) as u64;
            self.policy.limits.check(medium, name, len)?;
            bytes.extend_from_slice(&piece);
            kill_point("K15");
            let elapsed = started.elapsed();
            if elapsed > SLOW_START && len < elapsed.as_secs() * MIN_BYTES_PER_SECOND {
                let message = format!("`{name}` at {shown} came with {len} bytes in {} s", elapsed.as_secs());
                return Err(download_failed(message).with_reason("URL_TIMEOUT"));
            }
        }
        if bytes.is_empty() {
            let message = format!("`{name}` at {shown} holds no bytes");
            return Err(download_failed(message).with_reason("URL_FETCH_FAILED").with_retryable(false));
        }
        Ok(bytes)
    }
}

/// A client for addresses that a request names: it asks nobody inside, and follows redirects as `follow` says.
///
/// # Errors
/// [`Code::Internal`] when TLS cannot be set up.
pub(crate) fn guarded_client(policy: &FetchPolicy, follow: redirect::Policy) -> Result<Client, JobError> {
    let client = Client::builder()
        .no_proxy()
        .referer(false)
        .redirect(follow)
        .dns_resolver(Guard { allow_private: policy.allow_private })
        .connect_timeout(policy.connect_timeout)
        .read_timeout(policy.idle_timeout)
        .timeout(policy.total_timeout)
        // A kept connection would outlive the check of its address.
        .pool_max_idle_per_host(0)
        .user_agent(concat!("talkie/", env!("CARGO_PKG_VERSION")));
    client.build().map_err(|e| {
        JobError::new(Code::Internal, format!("HTTPS cannot be set up: {}", chain(&e)))
            .with_hint("install the root certificates of this system (ca-certificates)")
    })
}

/// Reads the local file at `path` for the field `name`; its size is looked at first.
///
/// # Errors
/// [`Code::InvalidInput`] when there is no such file or it cannot be read; [`Code::ImageTooLarge`],
/// [`Code::AudioTooLarge`].
pub fn read_file(name: &str, medium: Medium, path: &Path, limits: &Limits) -> Result<Vec<u8>, JobError> {
    let unreadable = |e: std::io::Error| {
        JobError::new(
            Code::InvalidInput,
            format!("`{name}` is {}, which cannot be read: {e}", path.display()),
        )
        .with_reason("FILE_UNREADABLE")
    };
    // The kind is asked before opening, since opening a pipe would wait for its writer.
    let metadata = path.metadata().map_err(unreadable)?;
    if !metadata.is_file() {
        let message = format!("`{name}` is {}, which is not a file", path.display());
        return Err(JobError::new(Code::InvalidInput, message).with_reason("FILE_UNREADABLE"));
    }
    limits.check(medium, name, metadata.len())?;
    let mut bytes = Vec::new();
    let most = limits.bytes(medium).saturating_add(1);
    File::open(path).and_then(|f| f.take(most).read_to_end(&mut bytes)).map_err(unreadable)?;
    limits.check(medium, name, bytes.len() as u64)?;
    Ok(bytes)
}

/// Why an address is not visited, as the rest of a sentence that starts with the address.
#[derive(Debug)]
pub(crate) struct Refused(pub(crate) String);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl StdError for Refused {}

/// Resolves names, and refuses those that lead inside.
pub(crate) struct Guard {
    pub(crate) allow_private: bool,
}

impl Resolve for Guard {
    fn resolve(&self, name: Name) -> Resolving {
        let allow_private = self.allow_private;
        Box::pin(async move {
            let found: Vec<SocketAddr> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            if !allow_private {
                check_answer(&found)?;
            }
            // The connection is made to these and to no others: a second answer is never asked for.
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

/// The URL that `text` is, of the field `name`, if it may be visited as far as its text tells.
///
/// # Errors
/// [`Code::UrlNotAllowed`].
pub(crate) fn parse_url(name: &str, text: &str, allow_private: bool) -> Result<Url, JobError> {
    let shown = redact_url(text);
    let url = Url::parse(text).map_err(|e| not_allowed(name, &shown, &format!("is not a URL ({e})")))?;
    check_url(&url, allow_private).map_err(|e| not_allowed(name, &shown, &e.0))?;
    Ok(url)
}

/// Judges a resolver's answer: one address that is not public condemns the name.
fn check_answer(found: &[SocketAddr]) -> Result<(), Refused> {
    match found.iter().all(|address| is_public(address.ip())) {
        true => Ok(()),
        false => Err(Refused("has a name that leads to an address that is not public".to_string())),
    }
}

/// Whether `url` may be visited, as far as its text tells.
pub(crate) fn check_url(url: &Url, allow_private: bool) -> Result<(), Refused> {
    let refused = |why: &str| Err(Refused(why.to_string()));
    if !matches!(url.scheme(), "http" | "https") {
        return refused("has another scheme than http and https");
    }
    if !url.username().is_empty() || url.password().is_some() {
        return refused("has a user name or password in it");
    }
    // The parser has brought every spelling of an IPv4 address to its plain form.
    let Some(host) = url.host_str() else { return refused("has no host") };
    if allow_private {
        return Ok(());
    }
    if !url.port_or_known_default().is_some_and(|p| PORTS.contains(&p)) {
        return refused("has a port that is not 80, 443, 8080 or 8443");
    }
    let literal = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    let inside = match literal.parse::<IpAddr>() {
        Ok(address) => !is_public(address),
        Err(_) => is_inside_name(host),
    };
    if inside { refused("leads to an address that is not public") } else { Ok(()) }
}

/// Whether `host` is a name of this machine or of a local network.
fn is_inside_name(host: &str) -> bool {
    let name = host.trim_end_matches('.').to_ascii_lowercase();
    let local = ["localhost", "local", "internal"];
    !name.contains('.') || local.iter().any(|end| name.rsplit('.').next() == Some(end))
}

/// Whether `address` is one of the public Internet.
pub(crate) fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => is_public_v6(address),
    }
}

/// Everything but the special blocks of RFC 6890 and its successors.
fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    let special = match (a, b, c) {
        (0 | 10 | 127, ..) => true,
        (100, 64..=127, _) => true,             // carrier-grade NAT, cloud metadata
        (169, 254, _) => true,                  // link-local, cloud metadata
        (172, 16..=31, _) => true,              // private
        (192, 0, 0 | 2) => true,                // protocol assignments, documentation
        (192, 88, 99) => true,                  // 6to4 relays
        (192, 168, _) => true,                  // private
        (198, 18 | 19, _) => true,              // benchmarks
        (198, 51, 100) | (203, 0, 113) => true, // documentation
        (224..=255, ..) => true,                // multicast, reserved, broadcast
        _ => false,
    };
    !special
}

/// Only 2000::/3 is global unicast, and of it not the blocks for tunnels and documentation. IPv4 addresses in
/// IPv6 clothes (mapped, compatible, NAT64) all lie outside, 6to4 and Teredo among the exceptions.
fn is_public_v6(address: Ipv6Addr) -> bool {
    let [a, b, ..] = address.segments();
    let special = match (a, b) {
        (0x2001, 0..=0x01ff) => true, // protocol assignments, Teredo
        (0x2001, 0x0db8) => true,     // documentation
        (0x2002, _) => true,          // 6to4
        (0x3fff, 0..=0x0fff) => true, // documentation
        _ => false,
    };
    a & 0xe000 == 0x2000 && !special
}

fn not_allowed(name: &str, shown: &str, why: &str) -> JobError {
    JobError::new(Code::UrlNotAllowed, format!("`{name}` at {shown} {why}"))
        .with_hint("give a public http(s) URL, or send the file itself as base64")
}

fn download_failed(message: String) -> JobError {
    JobError::new(Code::DownloadFailed, message).with_retryable(true)
}

/// What reqwest reports, without the URL that it would quote in full.
fn failed(name: &str, shown: &str, e: reqwest::Error) -> JobError {
    let e = e.without_url();
    let mut cause: Option<&(dyn StdError + 'static)> = Some(&e);
    while let Some(inner) = cause {
        if let Some(refused) = inner.downcast_ref::<Refused>() {
            return not_allowed(name, shown, &refused.0);
        }
        cause = inner.source();
    }
    if e.is_timeout() {
        return download_failed(format!("`{name}` at {shown} did not come in time"))
            .with_reason("URL_TIMEOUT");
    }
    let message = format!("`{name}` at {shown} could not be fetched: {}", chain(&e));
    download_failed(message).with_reason("URL_FETCH_FAILED")
}

/// An error with its causes, in one line.
pub(crate) fn chain(e: &dyn StdError) -> String {
    let mut text = e.to_string();
    let mut cause = e.source();
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(url: &str) -> bool {
        Url::parse(url).is_ok_and(|url| check_url(&url, false).is_ok())
    }

    #[test]
    fn public_addresses_pass() {
        for url in [
            "http://example.com/a.png",
            "https://example.com:443/a.png",
            "http://example.com:8080/a.png",
            "HTTP://EXAMPLE.com/A",
            "http://example.com/%0d%0aX-Injected:1",
            "http://example.com\\@169.254.169.254/",
            "http://1.1.1.1.nip.io/",
            "https://93.184.216.34/",
            "https://[2606:2800:220:1:248:1893:25c8:1946]/",
        ] {
            assert!(allowed(url), "{url}");
        }
    }

    #[test]
    fn hostile_urls_are_refused() {
        for url in [
            "http://example.com:22/a",
            "http://example.com:6379/",
            "http://127.0.0.1/",
            "http://127.1/",
            "http://2130706433/",
            "http://0x7f000001/",
            "http://0x7f.0.0.1/",
            "http://0177.0.0.1/",
            "http://017700000001/",
            "http://0/",
            "http://0.0.0.0/",
            "http://[::1]/",
            "http://[::]/",
            "http://[::ffff:127.0.0.1]/",
            "http://[::ffff:7f00:1]/",
            "http://[0:0:0:0:0:ffff:169.254.169.254]/",
            "http://[64:ff9b::169.254.169.254]/",
            "http://[2002:a9fe:a9fe::]/",
            "http://[fe80::1%25eth0]/",
            "http://[fd00:ec2::254]/latest/meta-data/",
            "http://169.254.169.254/latest/meta-data/",
            "http://169.254.170.2/v2/credentials",
            "http://2852039166/",
            "http://0xA9FEA9FE/",
            "http://169.254.43518/",
            "http://１６９.２５４.１６９.２５４/",
            "http://①⑥⑨.②⑤④.①⑥⑨.②⑤④/",
            "http://169。254。169。254/",
            "http://metadata.google.internal/",
            "http://metadata/",
            "http://localhost/",
            "http://localhost./",
            "http://LOCALHOST/",
            "http://foo.localhost/",
            "http://printer.local/",
            "http://100.100.100.200/",
            "http://192.0.0.192/",
            "http://user:pw@example.com/",
            "http://example.com@169.254.169.254/",
            "http://169.254.169.254#@example.com/",
            "http://169.254.169.254\\@example.com/",
            "http:///etc/passwd",
            "http:/169.254.169.254/",
            "http:169.254.169.254",
            "//169.254.169.254/",
            "file:///etc/passwd",
            "ftp://example.com/a",
            "gopher://127.0.0.1:6379/_INFO",
            "data:image/png;base64,AAAA",
            "javascript:alert(1)",
            "unix:///var/run/docker.sock",
            "jar:http://x!/y",
            "blob:https://example.com/x",
            "http://exa mple.com/",
            "http://example.com:99999/",
            "http://example.com:0/",
            "http://[::ffff:0:127.0.0.1]/",
            "http://[::127.0.0.1]/",
            "http://[fec0::1]/",
            "http://%31%36%39.254.169.254/",
            "http://169.254.169.254./",
            "http://224.0.0.1/",
            "http://255.255.255.255/",
            "http://10.0.0.1/",
            "http://172.31.255.255/",
            "http://192.168.0.1/",
            "http://198.19.0.1/",
            "http://[ff02::1]/",
            "http://[2001::1]/",
            "http://[2001:db8::1]/",
        ] {
            assert!(!allowed(url), "{url}");
        }
    }

    #[test]
    fn fault_49_one_inside_address_in_an_answer_condemns_the_name() {
        let answer = |texts: &[&str]| -> Vec<SocketAddr> {
            texts.iter().map(|text| SocketAddr::new(text.parse().unwrap(), 0)).collect()
        };
        assert!(check_answer(&answer(&["93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946"])).is_ok());
        for inside in
            ["127.0.0.1", "10.1.2.3", "169.254.169.254", "::1", "::ffff:10.0.0.1", "fd00::1", "2002:a00::1"]
        {
            assert!(check_answer(&answer(&["93.184.216.34", inside])).is_err(), "{inside}");
            assert!(check_answer(&answer(&[inside, "93.184.216.34"])).is_err(), "{inside}");
        }
    }

    #[test]
    fn development_may_look_inside_and_nowhere_else() {
        let check = |url: &str| check_url(&Url::parse(url).unwrap(), true).is_ok();
        assert!(check("http://127.0.0.1:39999/a.png") && check("http://localhost/"));
        assert!(!check("file:///etc/passwd") && !check("http://user@localhost/"));
    }

    #[test]
    fn files_are_measured_before_they_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, [7; 9]).unwrap();
        let limits = |n| Limits { image_bytes: n, audio_bytes: n };
        assert_eq!(read_file("image", Medium::Image, &path, &limits(9)).unwrap(), [7; 9]);
        let e = read_file("image", Medium::Image, &path, &limits(8)).unwrap_err();
        assert_eq!(e.code, Code::ImageTooLarge);
        for path in [dir.path(), &dir.path().join("none"), Path::new("/dev/zero")] {
            let e = read_file("image", Medium::Image, path, &limits(9)).unwrap_err();
            assert_eq!(e.code, Code::InvalidInput, "{e}");
        }
    }
}
