//! Verification of AWS Signature Version 4 in the Authorization header.

use aws_lc_rs::{constant_time, digest, hmac};

use crate::credentials::{Credentials, Issuer};
use crate::encoding::{hex, percent_encode, query_pairs};
use crate::log::LoggedRequest;

type Refusal = (u16, &'static str);

const MALFORMED: Refusal = (400, "AuthorizationHeaderMalformed");
const MISMATCH: Refusal = (403, "SignatureDoesNotMatch");

/// Checks that a request is signed with valid credentials.
///
/// # Errors
/// Status and S3 error code of the refusal.
pub(crate) fn authenticate(request: &LoggedRequest, issuer: &Issuer) -> Result<(), Refusal> {
    let header = request.header("authorization").ok_or((403, "AccessDenied"))?;
    let parameters = header.strip_prefix("AWS4-HMAC-SHA256").ok_or(MALFORMED)?;
    let parameter = |name: &str| {
        let find =
            |part: &'_ str| Some(part.trim().strip_prefix(name)?.strip_prefix('=')?.to_owned());
        parameters.split(',').find_map(find).ok_or(MALFORMED)
    };
    let (credential, signed) = (parameter("Credential")?, parameter("SignedHeaders")?);
    let signature = parameter("Signature")?;
    let (access_key_id, scope) = credential.split_once('/').ok_or(MALFORMED)?;
    let credentials = issuer.find(access_key_id, request.header("x-amz-security-token"))?;
    let names: Vec<&str> = signed.split(';').collect();
    if !names.contains(&"host") || !names.contains(&"x-amz-date") {
        return Err(MISMATCH);
    }
    let expected = sign(request, &credentials, scope, &names).ok_or(MALFORMED)?;
    constant_time::verify_slices_are_equal(expected.as_bytes(), signature.as_bytes())
        .map_err(|_| MISMATCH)
}

/// Returns the signature that a request should have; `None` if a header that it takes is missing.
fn sign(
    request: &LoggedRequest,
    credentials: &Credentials,
    scope: &str,
    signed_headers: &[&str],
) -> Option<String> {
    let mut headers = String::new();
    for name in signed_headers {
        let values = request.headers.get_all(*name).iter();
        let values: Vec<_> = values.map(|value| value.to_str().ok()).collect::<Option<_>>()?;
        let joined = values.join(",");
        let words: Vec<_> = joined.split_whitespace().collect();
        headers += &format!("{name}:{}\n", words.join(" "));
    }
    let mut query: Vec<_> = query_pairs(&request.query)
        .into_iter()
        .map(|(name, value)| (percent_encode(&name, false), percent_encode(&value, false)))
        .collect();
    query.sort();
    let query: Vec<_> = query.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let canonical = [
        &request.method,
        &percent_encode(&request.path, true),
        &query.join("&"),
        &headers,
        &signed_headers.join(";"),
        request.header("x-amz-content-sha256")?,
    ]
    .join("\n");
    let hash = hex(digest::digest(&digest::SHA256, canonical.as_bytes()).as_ref());
    let date = request.header("x-amz-date")?;
    let text = format!("AWS4-HMAC-SHA256\n{date}\n{scope}\n{hash}");
    let secret = format!("AWS4{}", credentials.secret_access_key).into_bytes();
    let key = scope.split('/').fold(secret, |key, part| mac(&key, part));
    Some(hex(&mac(&key, &text)))
}

fn mac(key: &[u8], text: &str) -> Vec<u8> {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text.as_bytes()).as_ref().to_vec()
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use hyper::HeaderMap;

    use super::*;

    /// "GET Object" of the Amazon S3 documentation, "Signature Calculations for the Authorization
    /// Header: Transferring Payload in a Single Chunk".
    #[test]
    fn documented_example_is_accepted() {
        let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("host", "examplebucket.s3.amazonaws.com"),
            ("range", "bytes=0-9"),
            ("x-amz-content-sha256", empty),
            ("x-amz-date", "20130524T000000Z"),
        ] {
            headers.insert(name, value.parse().unwrap());
        }
        let signature = "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41";
        let authorization = |signature: &str| {
            format!(
                "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/\
                 aws4_request,SignedHeaders=host;range;x-amz-content-sha256;x-amz-date,\
                 Signature={signature}"
            )
        };
        headers.insert("authorization", authorization(signature).parse().unwrap());
        let mut request = LoggedRequest {
            number: 0,
            method: "GET".to_owned(),
            path: "/test.txt".to_owned(),
            query: String::new(),
            range: None,
            headers,
            received: Instant::now(),
            status: 0,
            error: String::new(),
            served: None,
            bytes_sent: 0,
            duration: None,
        };
        let issuer = Issuer::new(std::time::Duration::ZERO);
        assert_eq!(authenticate(&request, &issuer), Err((403, "InvalidAccessKeyId")));
        issuer.add(Credentials::permanent(
            "AKIAIOSFODNN7EXAMPLE",
            "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        ));
        assert_eq!(authenticate(&request, &issuer), Ok(()));
        request.path.push('x');
        assert_eq!(authenticate(&request, &issuer), Err(MISMATCH));
        request.headers.remove("authorization");
        assert_eq!(authenticate(&request, &issuer), Err((403, "AccessDenied")));
    }
}
