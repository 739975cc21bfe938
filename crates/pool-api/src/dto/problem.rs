//! Errors on the wire: `application/problem+json` (RFC 9457), and their way back.

use std::time::Duration;

use http::StatusCode;
use pool_services::ControlError;
use serde::{Deserialize, Serialize};

/// An error as the API tells it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "server", derive(utoipa::ToSchema))]
pub struct Problem {
    /// `about:blank`: `code` is what tells problems apart.
    #[serde(rename = "type")]
    pub kind: String,
    /// The status in words.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What happened, without paths, pids or environment.
    pub detail: String,
    /// For programs.
    pub code: String,
    /// Whether the same request can succeed later.
    pub retriable: bool,
    /// When to try again, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

macro_rules! codes {
    ($(#[doc = $doc:literal] $name:ident = $text:literal, $status:ident, $retriable:literal;)*) => {
        /// The codes this version sends.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum Code {
            $(#[doc = $doc] $name,)*
        }

        impl Code {
            /// Every code.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The code on the wire.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// What it says, in a sentence.
            #[must_use]
            pub fn about(self) -> &'static str {
                match self { $(Self::$name => $doc.trim_ascii(),)* }
            }

            /// Its status.
            #[must_use]
            pub fn status(self) -> StatusCode {
                match self { $(Self::$name => StatusCode::$status,)* }
            }

            /// Whether the same request can succeed later.
            #[must_use]
            pub fn retriable(self) -> bool {
                match self { $(Self::$name => $retriable,)* }
            }
        }
    };
}

codes! {
    /// The request is not of the form.
    InvalidParams = "INVALID_PARAMS", BAD_REQUEST, false;
    /// No token that is taken here.
    Unauthorized = "UNAUTHORIZED", UNAUTHORIZED, false;
    /// A token that is not for this.
    Forbidden = "FORBIDDEN", FORBIDDEN, false;
    /// The Host or Origin is not allowed.
    ForbiddenHost = "FORBIDDEN_HOST", FORBIDDEN, false;
    /// No such pool.
    PoolNotFound = "POOL_NOT_FOUND", NOT_FOUND, false;
    /// No such lease.
    LeaseNotFound = "LEASE_NOT_FOUND", NOT_FOUND, false;
    /// No such operation.
    OperationNotFound = "OPERATION_NOT_FOUND", NOT_FOUND, false;
    /// No such device.
    DeviceNotFound = "DEVICE_NOT_FOUND", NOT_FOUND, false;
    /// No pool serves it.
    ModelNotFound = "MODEL_NOT_FOUND", NOT_FOUND, false;
    /// No such route.
    NotFound = "NOT_FOUND", NOT_FOUND, false;
    /// Not this method.
    MethodNotAllowed = "METHOD_NOT_ALLOWED", METHOD_NOT_ALLOWED, false;
    /// It contradicts what is going on.
    Conflict = "CONFLICT", CONFLICT, false;
    /// The config file is where the pool is changed.
    PoolInFile = "POOL_IN_FILE", CONFLICT, false;
    /// It would not fit if nobody else was there.
    DoesNotFit = "DOES_NOT_FIT", UNPROCESSABLE_ENTITY, false;
    /// The device mask cannot be.
    MaskInvalid = "MASK_INVALID", UNPROCESSABLE_ENTITY, false;
    /// The split cannot be.
    SplitInvalid = "SPLIT_INVALID", UNPROCESSABLE_ENTITY, false;
    /// The model is none, or not usable here.
    ModelRefInvalid = "MODEL_REF_INVALID", UNPROCESSABLE_ENTITY, false;
    /// The model may not be fetched here.
    ModelRefDenied = "MODEL_REF_DENIED", UNPROCESSABLE_ENTITY, false;
    /// An argument is not for a pool to give.
    ArgDenied = "ARG_DENIED", UNPROCESSABLE_ENTITY, false;
    /// No engine of this name can serve it.
    EngineUnknown = "ENGINE_UNKNOWN", UNPROCESSABLE_ENTITY, false;
    /// Every slot is taken.
    PoolSaturated = "POOL_SATURATED", TOO_MANY_REQUESTS, true;
    /// Nothing is ready.
    PoolUnready = "POOL_UNREADY", SERVICE_UNAVAILABLE, true;
    /// It is drained or held.
    PoolDraining = "POOL_DRAINING", SERVICE_UNAVAILABLE, true;
    /// The breaker is open.
    PoolUnavailable = "POOL_UNAVAILABLE", SERVICE_UNAVAILABLE, true;
    /// Others hold the GPU memory that it needs.
    InsufficientVram = "INSUFFICIENT_VRAM", SERVICE_UNAVAILABLE, true;
    /// The daemon is starting or stopping.
    Unavailable = "UNAVAILABLE", SERVICE_UNAVAILABLE, true;
    /// The engine did not answer, or not to the end.
    EngineFailed = "ENGINE_FAILED", BAD_GATEWAY, true;
    /// A bug.
    Internal = "INTERNAL", INTERNAL_SERVER_ERROR, false;
}

/// What helps with a request that is not of the form.
const FORM: &str = "GET /openapi.json describes what this request takes";

const SOON: Duration = Duration::from_secs(1);

impl Problem {
    /// A problem of this code.
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        Self {
            kind: "about:blank".into(),
            title: String::new(),
            status: 0,
            detail: detail.into(),
            code: code.as_str().into(),
            retriable: code.retriable(),
            retry_after_ms: None,
            hint: code.hint().map(str::to_owned),
        }
        .with_status(code.status())
        .with_retry(code.retriable().then_some(SOON))
    }

    /// With another status than its code's.
    #[must_use]
    pub fn with_status(mut self, status: StatusCode) -> Self {
        self.status = status.as_u16();
        self.title = status.canonical_reason().unwrap_or_default().to_owned();
        self
    }

    /// With a hint.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    fn with_retry(mut self, after: Option<Duration>) -> Self {
        self.retry_after_ms = after.map(|d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX));
        self
    }

    /// The inner error it stands for. `subject` is what was asked about.
    #[must_use]
    pub fn into_control(self, subject: &str) -> ControlError {
        let retry_after = Duration::from_millis(self.retry_after_ms.unwrap_or_default());
        match self.code.as_str() {
            "POOL_NOT_FOUND" => ControlError::PoolNotFound(subject.to_owned()),
            "OPERATION_NOT_FOUND" => ControlError::OperationNotFound(subject.to_owned()),
            "LEASE_NOT_FOUND" => ControlError::LeaseNotFound(subject.to_owned()),
            "DEVICE_NOT_FOUND" => ControlError::DeviceNotFound(subject.to_owned()),
            "POOL_IN_FILE" => ControlError::PoolInFile(subject.to_owned()),
            "CONFLICT" => ControlError::Conflict(self.detail),
            "POOL_SATURATED" => ControlError::Saturated { retry_after },
            "POOL_UNREADY" => ControlError::Unready {
                why: self.detail.strip_prefix("the pool is not ready: ").map(str::to_owned).unwrap_or(self.detail),
                retry_after: Some(retry_after),
            },
            "POOL_DRAINING" => ControlError::Draining,
            "POOL_UNAVAILABLE" => ControlError::Unavailable { retry_after },
            "INSUFFICIENT_VRAM" => ControlError::InsufficientVram {
                detail: self.detail,
                retry_after: self.retry_after_ms.map(Duration::from_millis),
            },
            "UNAVAILABLE" => ControlError::Unreachable(self.detail),
            _ => ControlError::Refused { code: self.code, detail: self.detail },
        }
    }
}

impl From<ControlError> for Problem {
    fn from(e: ControlError) -> Self {
        let text = e.to_string();
        match e {
            ControlError::PoolNotFound(_) => {
                Self::new(Code::PoolNotFound, text).with_hint("GET /v1/pools lists the pools")
            }
            ControlError::OperationNotFound(_) => {
                Self::new(Code::OperationNotFound, text).with_hint("GET /v1/operations lists recent operations")
            }
            ControlError::LeaseNotFound(_) => {
                Self::new(Code::LeaseNotFound, text).with_hint("GET /v1/leases lists those that are held")
            }
            ControlError::DeviceNotFound(_) => {
                Self::new(Code::DeviceNotFound, text).with_hint("GET /v1/node lists the devices")
            }
            ControlError::PoolInFile(_) => Self::new(Code::PoolInFile, text).with_hint(
                "change the file and POST /v1/config/reload, or POST …/reload, which holds until the file changes",
            ),
            ControlError::Conflict(_) => Self::new(Code::Conflict, text)
                .with_hint("GET /v1/pools/{id} shows how the pool stands, GET /v1/operations what is under way"),
            ControlError::Saturated { retry_after } => Self::new(Code::PoolSaturated, text)
                .with_retry(Some(retry_after))
                .with_hint("ask again then, or wait for a slot with wait_ms"),
            ControlError::Unready { retry_after, .. } => Self::new(Code::PoolUnready, text)
                .with_retry(retry_after.or(Some(SOON)))
                .with_hint("preload the pool, or read its state and reason; wait_ms waits for its start"),
            ControlError::Draining => {
                Self::new(Code::PoolDraining, text).with_hint("resume or preload the pool to use it again")
            }
            ControlError::Unavailable { retry_after } => {
                Self::new(Code::PoolUnavailable, format!("the pool's engine keeps failing: {}", wait(retry_after)))
                    .with_retry(Some(retry_after))
                    .with_hint("read the pool's last_error; POST …/breaker/reset tries at once")
            }
            ControlError::InsufficientVram { retry_after, .. } => {
                Self::new(Code::InsufficientVram, text).with_retry(Some(retry_after.unwrap_or(SOON))).with_hint(
                    "stop or drain a pool that stays, or give it less memory; GET /v1/pools tells who holds what",
                )
            }
            ControlError::Unreachable(_) => Self::new(Code::Unavailable, text),
            ControlError::Refused { code, detail } => {
                let known = Code::ALL.iter().find(|c| c.as_str() == code).copied();
                let mut p = Self::new(known.unwrap_or(Code::Internal), detail);
                p.code = code;
                if known.is_none() { p.with_status(StatusCode::BAD_GATEWAY) } else { p }
            }
            other => Self::new(Code::Internal, other.to_string()),
        }
    }
}

impl Code {
    /// What to do about it, where that is the same every time.
    #[must_use]
    pub fn hint(self) -> Option<&'static str> {
        Some(match self {
            Self::InvalidParams => FORM,
            Self::Conflict => {
                "GET /v1/pools/{id} and GET /v1/operations show what is there; ask for what follows from it"
            }
            Self::MaskInvalid => "GET /v1/node lists the devices",
            Self::SplitInvalid => "write \"off\", \"auto\", or one ratio for each device of the mask",
            Self::ModelRefInvalid => {
                "name a file below a root of [models], hf:ORG/REPO/FILE and its like, or stub:NAME for a stub engine"
            }
            Self::ModelRefDenied => "`[models] allow` in the config file says what may be fetched",
            Self::ArgDenied => "leave the argument out: the daemon gives it itself, or it is not for a pool to give",
            Self::EngineUnknown => "engines are declared in the config file; `stub` is there without being declared",
            Self::DoesNotFit => "POST /v1/plan shows what each device would hold, and what would fit instead",
            _ => return None,
        })
    }
}

fn wait(d: Duration) -> String {
    format!("the next start is tried in {} s", d.as_secs_f64().ceil())
}
