use serde_json::json;

use super::*;

fn args(set: &[(&str, &str)]) -> StorageArgs {
    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        storage: StorageArgs,
    }
    let flags =
        set.iter().map(|(name, value)| format!("--{}={value}", name.to_lowercase().replace('_', "-")));
    <Cli as clap::Parser>::parse_from(["x".to_string()].into_iter().chain(flags)).storage
}

const KEYS: [(&str, &str); 2] = [("BUCKET_ACCESS_KEY_ID", "k"), ("BUCKET_SECRET_ACCESS_KEY", "s")];
const R2: [(&str, &str); 4] = [
    ("R2_ACCOUNT_ID", "0123456789abcdef0123456789abcdef"),
    ("R2_ACCESS_KEY_ID", "k"),
    ("R2_SECRET_ACCESS_KEY", "canary-secret"),
    ("R2_BUCKET_NAME", "talk"),
];

#[test]
fn nothing_set_is_no_bucket() {
    assert!(args(&[]).settings().unwrap().is_none());
    let empty = args(&[("R2_ACCOUNT_ID", ""), ("BUCKET_NAME", " "), ("AWS_ACCESS_KEY_ID", "k")]);
    assert!(empty.settings().unwrap().is_none(), "keys of AWS alone are no bucket");
    assert_eq!(args(&[]).lifetimes().unwrap(), Lifetimes::default());
}

#[test]
fn r2_comes_first_and_hides_its_secret() {
    let mut set = R2.to_vec();
    set.extend([("BUCKET_ENDPOINT_URL", "https://x.example"), ("BUCKET_NAME", "other")]);
    let settings = args(&set).settings().unwrap().unwrap();
    let address = "https://0123456789abcdef0123456789abcdef.r2.cloudflarestorage.com/";
    assert_eq!((settings.endpoint.as_str(), settings.region.as_str()), (address, "auto"));
    assert_eq!((settings.bucket.as_str(), settings.public_url.as_str()), ("talk", address));
    assert!(!format!("{settings:?} {:?}", args(&set)).contains("canary"));
    set.push(("R2_ENDPOINT_URL", "http://127.0.0.1:9"));
    assert_eq!(args(&set).settings().unwrap().unwrap().endpoint.as_str(), "http://127.0.0.1:9/");
}

#[test]
fn what_is_missing_is_named() {
    let missing = |set: &[(&str, &str)]| args(set).settings().unwrap_err().message;
    for (name, _) in R2 {
        let rest: Vec<_> = R2.into_iter().filter(|(n, _)| *n != name).collect();
        assert!(missing(&rest).contains(&format!("`{name}`")), "{name}");
    }
    assert!(missing(&KEYS).contains("`BUCKET_ENDPOINT_URL`"));
    assert!(
        missing(&[KEYS[0], ("BUCKET_ENDPOINT_URL", "https://s3.example")])
            .contains("`BUCKET_SECRET_ACCESS_KEY`")
    );
    assert!(missing(&[("BUCKET_NAME", "talk")]).contains("`AWS_ACCESS_KEY_ID`"));
    assert!(
        missing(&[KEYS[0], KEYS[1], ("BUCKET_ENDPOINT_URL", "https://s3.example")]).contains("`BUCKET_NAME`")
    );
}

#[test]
fn an_address_may_hold_the_bucket() {
    let place = |address: &str, bucket: &str| {
        let set = [KEYS[0], KEYS[1], ("BUCKET_ENDPOINT_URL", address), ("BUCKET_NAME", bucket)];
        args(&set).settings().map(|s| s.unwrap()).map(|s| (s.endpoint.to_string(), s.bucket, s.region))
    };
    for (address, bucket, expected) in [
        ("https://s3.example.com", "talk", ("https://s3.example.com/", "talk", "us-east-1")),
        ("http://localhost:9000/talk", "", ("http://localhost:9000/", "talk", "us-east-1")),
        ("http://localhost:9000/talk/", "talk", ("http://localhost:9000/", "talk", "us-east-1")),
        ("https://talk.s3.example.com", "talk", ("https://s3.example.com/", "talk", "us-east-1")),
        (
            "https://talk.s3.eu-west-1.amazonaws.com",
            "",
            ("https://s3.eu-west-1.amazonaws.com/", "talk", "eu-west-1"),
        ),
        (
            "https://talk.fra1.digitaloceanspaces.com",
            "",
            ("https://fra1.digitaloceanspaces.com/", "talk", "fra1"),
        ),
        (
            "https://talk.0123456789abcdef0123456789abcdef.eu.r2.cloudflarestorage.com",
            "",
            ("https://0123456789abcdef0123456789abcdef.eu.r2.cloudflarestorage.com/", "talk", "auto"),
        ),
    ] {
        let (endpoint, name, region) = place(address, bucket).unwrap();
        assert_eq!((endpoint.as_str(), name.as_str(), region.as_str()), expected, "{address}");
    }
    for (address, bucket) in [
        ("https://s3.example.com", ""),
        ("https://s3.us-west-2.amazonaws.com", ""),
        ("https://0123456789abcdef0123456789abcdef.eu.r2.cloudflarestorage.com", ""),
        ("https://s3.example.com/a/b", ""),
        ("https://s3.example.com/a", "talk"),
        ("ftp://s3.example.com", "talk"),
        ("https://s3.example.com", "Talk_ie"),
        ("https://k:s@s3.example.com", "talk"),
    ] {
        assert_eq!(place(address, bucket).unwrap_err().code, Code::InvalidInput, "{address} {bucket}");
    }
}

#[test]
fn aws_needs_a_bucket_and_knows_its_address() {
    let mut set = vec![
        ("AWS_ACCESS_KEY_ID", "k"),
        ("AWS_SECRET_ACCESS_KEY", "s"),
        ("AWS_SESSION_TOKEN", "t"),
        ("AWS_REGION", "eu-north-1"),
        ("AWS_BUCKET_NAME", "talk"),
    ];
    let settings = args(&set).settings().unwrap().unwrap();
    assert_eq!(settings.endpoint.as_str(), "https://s3.eu-north-1.amazonaws.com/");
    assert_eq!((settings.region.as_str(), settings.bucket.as_str()), ("eu-north-1", "talk"));
    assert_eq!(settings.credentials.session_token.unwrap().expose(), "t");
    set.push(("AWS_ENDPOINT_URL", "http://127.0.0.1:4566"));
    assert_eq!(args(&set).settings().unwrap().unwrap().endpoint.as_str(), "http://127.0.0.1:4566/");
}

#[test]
fn a_worker_comes_to_the_same_settings() {
    let set = [KEYS[0], KEYS[1], ("BUCKET_ENDPOINT_URL", "http://127.0.0.1:8000"), ("BUCKET_NAME", "talk")];
    let more = [
        ("BUCKET_PUBLIC_URL", "https://talk.example"),
        ("BUCKET_SESSION_TOKEN", "t"),
        ("VIDEO_RETENTION_HOURS", "0.5"),
        ("SPOOL_RETENTION_HOURS", "48"),
    ];
    let first = args(&[&set[..], &more[..]].concat()).settings().unwrap().unwrap();
    let env = first.to_env();
    let env: Vec<_> = env.iter().map(|(name, value)| (*name, value.expose())).collect();
    let second = args(&env).settings().unwrap().unwrap();
    assert_eq!(format!("{first:?}"), format!("{second:?}"));
    assert_eq!(second.credentials.secret_access_key.expose(), "s");
    assert_eq!(second.lifetimes.retention, Duration::from_secs(1800));
    assert_eq!(second.lifetimes.spool, Duration::from_secs(2 * 86_400));
}

#[test]
fn wrong_lifetimes_are_named() {
    for (name, value) in [
        ("VIDEO_RETENTION_HOURS", "0"),
        ("VIDEO_RETENTION_HOURS", "NaN"),
        ("SPOOL_RETENTION_HOURS", "8761"),
        ("PRESIGN_EXPIRES_SECONDS", "604801"),
        ("PRESIGN_EXPIRES_SECONDS", "59"),
    ] {
        let e = args(&[(name, value)]).lifetimes().unwrap_err();
        assert!(e.message.contains(name) && e.message.contains(value), "{e}");
    }
}

#[test]
fn a_jobs_own_store_is_held_to_the_rules_of_urls() {
    let config = |endpoint: &str| json!({"accessId": "k", "accessSecret": "canary", "bucketName": "talk", "endpointUrl": endpoint});
    let read =
        |config: &Value, private| StorageSettings::from_s3_config(config, Lifetimes::default(), private);
    let settings = read(&config("https://s3.example.com"), false).unwrap();
    assert_eq!((settings.endpoint.as_str(), settings.bucket.as_str()), ("https://s3.example.com/", "talk"));
    for inside in
        ["http://127.0.0.1:9000", "http://169.254.169.254", "https://minio.internal", "http://10.1.2.3/talk"]
    {
        assert_eq!(read(&config(inside), false).unwrap_err().code, Code::UrlNotAllowed, "{inside}");
        assert!(read(&config(inside), true).is_ok(), "{inside}");
    }
    for field in ["accessId", "accessSecret", "bucketName", "endpointUrl"] {
        let mut config = config("https://s3.example.com");
        config.as_object_mut().unwrap().remove(field);
        let e = read(&config, false).unwrap_err();
        assert!(e.message.contains(&format!("s3Config.{field}")), "{e}");
    }
    for malformed in [json!("canary"), json!({"accessId": ["canary"]}), json!(null)] {
        let e = read(&malformed, false).unwrap_err();
        assert!(e.code == Code::InvalidInput && !e.message.contains("canary"), "{e}");
    }
}
