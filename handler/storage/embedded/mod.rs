//! An S3 store over a folder, for machines where no other is configured. What speaks to it is the same client,
//! with real signatures, methods and expiries.
//!
//! The gateway merges [`Embedded::router`] into its own, without limits on bodies and their time.

mod backend;
mod credentials;
mod objects;
mod uploads;

use std::path::Path;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::header::{CONTENT_TYPE, HeaderName, HeaderValue, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS};
use axum::http::{Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use reqwest::Url;
use s3s::auth::SimpleAuth;
use s3s::service::{S3Service, S3ServiceBuilder};
use time::format_description;
use time::{OffsetDateTime, PrimitiveDateTime};
use tower_http::cors::{Any, CorsLayer};

use self::backend::Backend;
use self::objects::Objects;
use super::Storage;
use super::client::quietly;
use super::settings::{Credentials, Lifetimes, StorageSettings};
use crate::job::{Code, JobError};

/// The one bucket.
pub const BUCKET: &str = "talkie-videos";

/// Longest life of a link, in seconds, as on S3.
const MAX_LINK_LIFE: i64 = 7 * 86_400;
const AMZ_DATE: &str = "[year][month][day]T[hour][minute][second]Z";

/// Whose rules hold where stores differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Rules {
    /// Those of S3.
    #[default]
    S3,
    /// Those of Cloudflare R2, which are stricter: the parts of an upload have one size, a key is written at
    /// most once a second, and an expired link is a bad request. For tests.
    R2,
}

/// The store over one folder, with its key.
#[derive(Clone, Debug)]
pub struct Embedded {
    objects: Arc<Objects>,
    credentials: Credentials,
    rules: Rules,
}

impl Embedded {
    /// The store in `<data_dir>/objects`, with the key in `<data_dir>/s3-credentials`; both are made where
    /// they are missing. Leftovers of a process that was killed are removed.
    ///
    /// # Errors
    /// [`Code::InvalidInput`] when the folder cannot be written to, naming the path.
    pub fn open(data_dir: &Path, rules: Rules) -> Result<Self, JobError> {
        let objects = Arc::new(Objects::open(&data_dir.join("objects"))?);
        let credentials = credentials::load_or_create(&data_dir.join("s3-credentials"))?;
        Ok(Self { objects, credentials, rules })
    }

    /// The settings of clients that reach the store at `endpoint`, with links for `public_url`.
    pub fn settings(&self, endpoint: Url, public_url: Url, lifetimes: Lifetimes) -> StorageSettings {
        StorageSettings {
            endpoint,
            region: "auto".to_string(),
            bucket: BUCKET.to_string(),
            credentials: self.credentials.clone(),
            public_url,
            lifetimes,
        }
    }

    /// The store served at a free port of this machine until the runtime ends, for a program that is not the
    /// gateway; links are for `public_url`.
    ///
    /// # Errors
    /// [`Code::Internal`] when no port is free.
    pub async fn serve_here(&self, public_url: Url, lifetimes: Lifetimes) -> Result<Storage, JobError> {
        let failed = |e: &dyn std::fmt::Display| {
            JobError::new(Code::Internal, format!("the embedded store cannot be served: {e}"))
        };
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.map_err(|e| failed(&e))?;
        let address = listener.local_addr().map_err(|e| failed(&e))?;
        let endpoint = Url::parse(&format!("http://{address}")).map_err(|e| failed(&e))?;
        let router = self.router();
        tokio::spawn(async move { axum::serve(listener, router).await });
        Ok(Storage::new(self.settings(endpoint, public_url, lifetimes)))
    }

    /// Serves the store at paths that start with the bucket. Bodies are streamed both ways.
    pub fn router(&self) -> Router {
        let backend = Backend::new(self.objects.clone(), self.rules);
        let mut service = S3ServiceBuilder::new(backend);
        let Credentials { access_key_id, secret_access_key, .. } = &self.credentials;
        service.set_auth(SimpleAuth::from_single(access_key_id.as_str(), secret_access_key.expose()));
        let (service, rules) = (service.build(), self.rules);
        // Links are open to whoever has them, so pages of any origin may play them; they carry no cookies.
        let cors = CorsLayer::new()
            .allow_origin(Any)
            .allow_methods([Method::GET, Method::HEAD])
            .allow_headers([header::RANGE])
            .expose_headers([
                header::CONTENT_RANGE,
                header::CONTENT_LENGTH,
                header::ACCEPT_RANGES,
                header::ETAG,
            ]);
        let serve = any(move |request: Request| serve(service.clone(), rules, request));
        let root = format!("/{BUCKET}");
        Router::new()
            .route(&root, serve.clone())
            .route(&format!("{root}/"), serve.clone())
            .route(&format!("{root}/{{*key}}"), serve)
            .layer(cors)
            // A video has any size; what it may cost is up to the disk.
            .layer(axum::extract::DefaultBodyLimit::disable())
    }
}

async fn serve(service: S3Service, rules: Rules, request: Request) -> Response {
    let mut response = match refused_link(&request, rules) {
        Some(refusal) => refusal,
        // The service logs requests with their signatures, and wrong ones as errors of its own.
        None => match quietly(tower::ServiceExt::oneshot(service, request)).await {
            Ok(response) => response.map(Body::new),
            Err(_) => s3_error(StatusCode::INTERNAL_SERVER_ERROR, "InternalError", "The store failed"),
        },
    };
    if response.status().is_server_error() && response.status() != StatusCode::NOT_IMPLEMENTED {
        tracing::error!(status = response.status().as_u16(), "the embedded store could not answer");
    }
    // A page that shows a video must not pass the link on.
    let headers: [(HeaderName, &str); 2] =
        [(REFERRER_POLICY, "no-referrer"), (X_CONTENT_TYPE_OPTIONS, "nosniff")];
    for (name, value) in headers {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

/// The refusal of a link whose life is out of bounds or over, before its signature is looked at.
fn refused_link(request: &Request, rules: Rules) -> Option<Response> {
    let query: Vec<(String, String)> = Url::parse("http://x")
        .ok()
        .map(|mut url| {
            url.set_query(request.uri().query());
            url.query_pairs().into_owned().collect()
        })
        .unwrap_or_default();
    let value = |name: &str| query.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str());
    let expires = value("X-Amz-Expires")?;
    let Some(life) = expires.parse().ok().filter(|life| (1..=MAX_LINK_LIFE).contains(life)) else {
        let message = "X-Amz-Expires must be between 1 and 604800 seconds";
        return Some(s3_error(StatusCode::BAD_REQUEST, "AuthorizationQueryParametersError", message));
    };
    let format = format_description::parse_borrowed::<2>(AMZ_DATE).ok()?;
    let signed = PrimitiveDateTime::parse(value("X-Amz-Date")?, &format).ok()?.assume_utc();
    let over = OffsetDateTime::now_utc() - signed > time::Duration::seconds(life);
    match (over, rules) {
        (false, _) => None,
        (true, Rules::R2) => Some(s3_error(StatusCode::BAD_REQUEST, "ExpiredRequest", "Request has expired")),
        (true, Rules::S3) => Some(s3_error(StatusCode::FORBIDDEN, "AccessDenied", "Request has expired")),
    }
}

fn s3_error(status: StatusCode, code: &str, message: &str) -> Response {
    let body = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
    );
    (status, [(CONTENT_TYPE, "application/xml")], body).into_response()
}
