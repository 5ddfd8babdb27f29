//! Sources of credentials, and their renewal.

use std::path::Path;

use object_reader::{CredentialSource, StoreConfig, StoreErrorKind as Kind};

use crate::plain::part;
use crate::server::{Received, Reply, Server, config_with, object, parse};

const EXPIRED: &str = "<Error><Code>ExpiredToken</Code></Error>";

fn profile(key_id: &str) -> String {
    format!(
        "[default]\naws_access_key_id = {key_id}\naws_secret_access_key=s3cret\n\
         aws_session_token = s3cret-token\n[other]\naws_access_key_id=OTHER\n\
         aws_secret_access_key=s3cret\n[sso]\nsso_session=x\n"
    )
}

/// Serves an object to those whose credentials contain `accepted`.
fn guarded(received: &Received, accepted: &str) -> Reply {
    let authorization = received.header("authorization");
    match authorization.contains(accepted) {
        true => object(b"0123456789", "\"1\"")(received),
        false => Reply::new(400, &[], EXPIRED),
    }
}

#[tokio::test]
async fn expired_credentials_in_a_file_are_renewed_once() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("credentials");
    std::fs::write(&file, profile("OLD")).unwrap();
    let path = file.clone();
    let server = Server::start(move |received| {
        if received.header("authorization").contains("OLD") {
            std::fs::write(&path, profile("NEW")).unwrap();
        }
        guarded(received, "Credential=NEW/")
    })
    .await;
    let config = StoreConfig {
        endpoint: Some(server.url()),
        credentials: CredentialSource::File(file.clone()),
        ..config_with(&[])
    };
    let store = config.open(parse("s3://b").store()).unwrap();
    store.get("k", &part(0, 4)).await.unwrap();
    assert_eq!(server.requests().len(), 2);
    assert_eq!(server.requests()[1].header("x-amz-security-token"), "s3cret-token");

    // A changed file is noticed without a rejection; rejected credentials don't cause a loop.
    std::fs::write(&file, profile("NEWER")).unwrap();
    let error = store.get("k", &part(0, 4)).await.unwrap_err();
    assert_eq!(error.kind, Kind::CredentialsExpired, "{error}");
    assert!(server.requests()[2].header("authorization").contains("NEWER"));
    assert!(server.requests().len() <= 4);
    let shown = format!("{error} {error:?} {store:?} {config:?}");
    assert!(!shown.contains("s3cret"), "{shown}");
}

#[tokio::test]
async fn web_identities_are_exchanged_and_renewed() {
    let folder = tempfile::tempdir().unwrap();
    let token_file = folder.path().join("token");
    std::fs::write(&token_file, "s3cret-identity\n").unwrap();
    let count = std::sync::atomic::AtomicUsize::new(0);
    let sts = Server::start(move |received| {
        assert!(received.body.contains("WebIdentityToken=s3cret%2Didentity"), "{}", received.body);
        let count = count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        Reply::new(200, &[], format!(
            "<AssumeRoleWithWebIdentityResponse><Credentials><AccessKeyId>KEY{count}</AccessKeyId>\
             <SecretAccessKey>s3cret</SecretAccessKey><SessionToken>s3cret-token</SessionToken>\
             <Expiration>2099-01-01T00:00:00Z</Expiration></Credentials>"
        ))
    })
    .await;
    let server = Server::start(|received| guarded(received, "Credential=KEY1/")).await;
    let sts_url = sts.url();
    let mut config = config_with(&[
        ("AWS_WEB_IDENTITY_TOKEN_FILE", token_file.to_str().unwrap()),
        ("AWS_ROLE_ARN", "arn:aws:iam::1:role/r"),
        ("AWS_ENDPOINT_URL_STS", &sts_url),
    ]);
    config.endpoint = Some(server.url());
    let url = parse("s3://b");
    let store = config.open(url.store()).unwrap();
    assert_eq!(store.credentials_expiry(), None);
    store.get("k", &part(0, 4)).await.unwrap();
    assert_eq!((sts.requests().len(), server.requests().len()), (2, 2));
    let expiry = humantime::parse_rfc3339("2099-01-01T00:00:00Z").unwrap();
    assert_eq!(store.credentials_expiry(), Some(expiry));
    let ports = [server.address.port(), sts.address.port()];
    let addresses = config.addresses(url.store()).unwrap();
    assert_eq!(addresses.iter().map(|(_, port)| *port).collect::<Vec<_>>(), ports);

    let denying = Server::start(|_| Reply::new(403, &[], "<Code>AccessDenied</Code>")).await;
    let denying_url = denying.url();
    config.environment = object_reader::Environment::from_pairs([
        ("AWS_WEB_IDENTITY_TOKEN_FILE", token_file.to_str().unwrap()),
        ("AWS_ROLE_ARN", "arn:aws:iam::1:role/r"),
        ("AWS_ENDPOINT_URL_STS", &denying_url),
    ]);
    let error = config.open(url.store()).unwrap().get("k", &part(0, 4)).await.unwrap_err();
    assert_eq!(error.kind, Kind::Denied);
    assert!(error.message.contains("security token service: status 403 AccessDenied"), "{error}");
    assert!(!format!("{error:?}").contains("s3cret"));
}

#[tokio::test]
async fn metadata_services_issue_credentials() {
    let json = r#"{"AccessKeyId":"KEY","SecretAccessKey":"s3cret","Token":"t",
        "Expiration":"2099-01-01T00:00:00Z"}"#;
    let metadata =
        Server::start(move |received| match (received.method.as_str(), received.target.as_str()) {
            ("PUT", "/latest/api/token") => Reply::new(200, &[], "session"),
            ("GET", "/container") if received.header("authorization") == "s3cret-pod" => {
                Reply::new(200, &[], json)
            }
            ("GET", path) if received.header("x-aws-ec2-metadata-token") == "session" => {
                match path.strip_prefix("/latest/meta-data/iam/security-credentials/") {
                    Some("") => Reply::new(200, &[], "role\n"),
                    Some("role") => Reply::new(200, &[], json),
                    _ => Reply::new(404, &[], ""),
                }
            }
            ("GET", path) if path.starts_with("/computeMetadata/") => {
                assert_eq!(received.header("metadata-flavor"), "Google");
                Reply::new(200, &[], r#"{"access_token":"Credential=KEY/","expires_in":3600}"#)
            }
            ("GET", path) if path.starts_with("/metadata/identity") => {
                assert_eq!(received.header("metadata"), "true");
                Reply::new(200, &[], r#"{"access_token":"Credential=KEY/","expires_in":"3600"}"#)
            }
            _ => Reply::new(401, &[], ""),
        })
        .await;
    let server = Server::start(|received| guarded(received, "Credential=KEY/")).await;
    let metadata_url = metadata.url();
    let container_url = format!("{metadata_url}/container");
    let metadata_host = metadata.address.to_string();
    for (url, source, variables) in [
        (
            "s3://b",
            CredentialSource::Instance,
            vec![("AWS_EC2_METADATA_SERVICE_ENDPOINT", &*metadata_url)],
        ),
        (
            "s3://b",
            CredentialSource::Auto,
            vec![
                ("AWS_CONTAINER_CREDENTIALS_FULL_URI", &*container_url),
                ("AWS_CONTAINER_AUTHORIZATION_TOKEN", "s3cret-pod"),
            ],
        ),
        ("gs://b", CredentialSource::Instance, vec![("GCE_METADATA_HOST", &*metadata_host)]),
        (
            "az://b",
            CredentialSource::Instance,
            vec![
                ("AZURE_POD_IDENTITY_AUTHORITY_HOST", &*metadata_url),
                ("AZURE_STORAGE_ACCOUNT", "account"),
            ],
        ),
    ] {
        let mut config = config_with(&variables);
        config.endpoint = Some(server.url());
        config.credentials = source;
        let store = config.open(parse(url).store()).unwrap();
        store.get("k", &part(0, 4)).await.unwrap_or_else(|error| panic!("{url}: {error}"));
        assert!(store.credentials_expiry().is_some(), "{url}");
    }
}

#[tokio::test]
async fn azure_tokens_are_exchanged_and_sas_tokens_sent() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("token");
    std::fs::write(&file, "s3cret-identity").unwrap();
    let entra = Server::start(|received| {
        assert_eq!(received.target, "/tenant/oauth2/v2.0/token");
        assert!(received.body.contains("client_assertion=s3cret%2Didentity"), "{}", received.body);
        Reply::new(200, &[], r#"{"access_token":"accepted","expires_in":3600}"#)
    })
    .await;
    let server = Server::start(|received| match received.target.contains("sig=s3cret") {
        true => object(b"0123456789", "\"1\"")(received),
        false => guarded(received, "Bearer accepted"),
    })
    .await;
    let entra_url = entra.url();
    let mut config = config_with(&[
        ("AZURE_STORAGE_ACCOUNT", "account"),
        ("AZURE_AUTHORITY_HOST", &entra_url),
        ("AZURE_TENANT_ID", "tenant"),
        ("AZURE_CLIENT_ID", "client"),
        ("AZURE_FEDERATED_TOKEN_FILE", file.to_str().unwrap()),
    ]);
    config.endpoint = Some(server.url());
    let store = config.open(parse("az://b").store()).unwrap();
    store.get("k", &part(0, 4)).await.unwrap();

    std::fs::write(&file, "?sv=2026&sig=s3cret%2B\n").unwrap();
    config.credentials = CredentialSource::File(file.clone());
    let store = config.open(parse("az://b").store()).unwrap();
    store.get("k", &part(0, 4)).await.unwrap();
    let target = server.requests().pop().unwrap().target;
    assert!(target.contains("sv=2026") && target.contains("sig=s3cret%2B"), "{target}");
}

#[tokio::test]
async fn service_accounts_sign_their_tokens() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_RSA_SHA256).unwrap();
    let json = serde_json::json!({
        "type": "service_account",
        "client_email": "reader@project.example",
        "private_key_id": "k1",
        "private_key": key.serialize_pem(),
    });
    std::fs::write(file.path(), json.to_string()).unwrap();
    let server = Server::start(|received| guarded(received, "Bearer ey")).await;
    let mut config =
        config_with(&[("GOOGLE_APPLICATION_CREDENTIALS", file.path().to_str().unwrap())]);
    config.endpoint = Some(server.url());
    let store = config.open(parse("gs://b").store()).unwrap();
    store.get("k", &part(0, 4)).await.unwrap();
    assert!(store.credentials_expiry().is_some());

    use base64::Engine;
    let authorization = server.requests()[0].header("authorization").to_owned();
    let token = authorization.strip_prefix("Bearer ").unwrap();
    let claims = token.split('.').nth(1).unwrap();
    let claims = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(claims).unwrap();
    let claims: serde_json::Value = serde_json::from_slice(&claims).unwrap();
    assert_eq!(claims["iss"], "reader@project.example");
}

#[test]
fn missing_credentials_are_explained_without_secrets() {
    let folder = tempfile::tempdir().unwrap();
    let aws = folder.path().join(".aws");
    std::fs::create_dir(&aws).unwrap();
    std::fs::write(aws.join("credentials"), profile("KEY")).unwrap();
    std::fs::write(
        aws.join("config"),
        "[profile role]\nrole_arn=x\n[default]\nregion=eu-north-1\n",
    )
    .unwrap();
    let invalid = folder.path().join("invalid");
    std::fs::write(&invalid, "{\"private_key\": \"s3cret\"").unwrap();
    let home = folder.path().to_str().unwrap();
    let missing = Path::new("/nonexistent/file").to_owned();
    for (url, source, variables, words) in [
        ("s3://b", CredentialSource::Auto, vec![], "no AWS credentials found"),
        (
            "s3://b",
            CredentialSource::Auto,
            vec![("AWS_SECRET_ACCESS_KEY", "s3cret")],
            "without AWS_ACCESS_KEY_ID",
        ),
        (
            "s3://b",
            CredentialSource::Auto,
            vec![("HOME", home), ("AWS_PROFILE", "absent")],
            "profile absent has no",
        ),
        (
            "s3://b",
            CredentialSource::Auto,
            vec![("HOME", home), ("AWS_PROFILE", "sso")],
            "profile sso uses SSO",
        ),
        (
            "s3://b",
            CredentialSource::Auto,
            vec![("HOME", home), ("AWS_PROFILE", "role")],
            "assumed role",
        ),
        (
            "s3://b",
            CredentialSource::Auto,
            vec![("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://evil.example/")],
            "without TLS",
        ),
        ("s3://b", CredentialSource::WebIdentity, vec![], "AWS_ROLE_ARN"),
        ("s3://b", CredentialSource::File(missing.clone()), vec![], "/nonexistent/file: No such"),
        ("s3://b", CredentialSource::File(invalid.clone()), vec![], "has no aws_access_key_id"),
        ("gs://b", CredentialSource::Auto, vec![], "GOOGLE_APPLICATION_CREDENTIALS"),
        ("gs://b", CredentialSource::File(invalid), vec![], "not the JSON key"),
        ("gs://b", CredentialSource::WebIdentity, vec![], "`instance`"),
        ("az://b", CredentialSource::Auto, vec![("AZURE_STORAGE_ACCOUNT", "a")], "no Azure"),
        ("az://b", CredentialSource::Anonymous, vec![], "account"),
        ("https://h", CredentialSource::Environment, vec![], "from a file"),
        ("https://h", CredentialSource::File(missing), vec![], "/nonexistent/file: No such"),
    ] {
        let mut config = config_with(&variables);
        config.credentials = source;
        let error = config.open(parse(url).store()).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
        assert!(!format!("{error} {config:?}").contains("s3cret"), "{error}");
    }
    let config = config_with(&[("HOME", home)]);
    config.open(parse("s3://b").store()).unwrap();
    let addresses = config.addresses(parse("s3://b").store()).unwrap();
    assert_eq!(addresses[0].0, "b.s3.eu-north-1.amazonaws.com", "region of the profile");
}
