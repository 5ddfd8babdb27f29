//! Choice of an HTTP proxy for a connection.

use std::fmt;
use std::net::IpAddr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ipnet::IpNet;
use percent_encoding::percent_decode_str;

use crate::stores::{Environment, Secret};
use crate::url::{bracketed, parse_authority};

/// Port of a proxy whose URL has none, as for curl.
const DEFAULT_PORT: u16 = 1080;

/// Choice of the proxy for connections to stores. Loopback addresses, link-local ones (instance
/// metadata) and the hosts in `NO_PROXY` are always connected to directly.
#[derive(Clone, Default)]
pub enum ProxyChoice {
    /// The proxies in `HTTPS_PROXY` and `HTTP_PROXY`, also in lower case. `ALL_PROXY` isn't read.
    #[default]
    Environment,
    /// No proxy.
    Direct,
    /// The proxy with this URL, `http://[USER:PASSWORD@]HOST:PORT`.
    Url(Secret),
}

impl fmt::Debug for ProxyChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Environment => "Environment",
            Self::Direct => "Direct",
            Self::Url(_) => "Url(..)",
        })
    }
}

/// An HTTP proxy.
#[derive(Clone)]
pub(crate) struct Proxy {
    /// Name or address without brackets.
    pub(crate) host: String,
    pub(crate) port: u16,
    /// Value of the header `Proxy-Authorization`.
    pub(super) authorization: Option<Secret>,
}

impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", bracketed(&self.host), self.port)
    }
}

/// Proxies by scheme of the request, and the hosts that are connected to directly.
#[derive(Clone, Default)]
pub(crate) struct ProxyRules {
    https: Option<Proxy>,
    http: Option<Proxy>,
    exceptions: Exceptions,
}

impl ProxyRules {
    /// Reads the proxies from the choice and the environment. An error doesn't repeat the URL.
    pub(crate) fn new(choice: &ProxyChoice, environment: &Environment) -> Result<Self, String> {
        let exceptions = lookup(environment, "NO_PROXY").map(Exceptions::parse).unwrap_or_default();
        let from_environment = |name| match lookup(environment, name) {
            Some(url) => parse_proxy(url).map(Some).map_err(|why| format!("{name}: {why}")),
            None => Ok(None),
        };
        let (https, http) = match choice {
            ProxyChoice::Direct => (None, None),
            ProxyChoice::Url(url) => {
                let proxy = parse_proxy(url.expose()).map_err(|why| format!("proxy: {why}"))?;
                (Some(proxy.clone()), Some(proxy))
            }
            ProxyChoice::Environment => {
                (from_environment("HTTPS_PROXY")?, from_environment("HTTP_PROXY")?)
            }
        };
        Ok(Self { https, http, exceptions })
    }

    /// Returns the proxy for a host without brackets, or `None` to connect directly.
    pub(crate) fn proxy_for(&self, is_https: bool, host: &str) -> Option<&Proxy> {
        let proxy = if is_https { self.https.as_ref() } else { self.http.as_ref() }?;
        let is_local = match host.parse::<IpAddr>() {
            Ok(IpAddr::V4(address)) => address.is_loopback() || address.is_link_local(),
            Ok(IpAddr::V6(address)) => address.is_loopback() || address.is_unicast_link_local(),
            Err(_) => host == "localhost",
        };
        (!is_local && !self.exceptions.contains(host)).then_some(proxy)
    }
}

/// Returns the variable `name`, in lower case first, unless it is empty.
fn lookup<'a>(environment: &'a Environment, name: &str) -> Option<&'a str> {
    environment.get(&name.to_ascii_lowercase()).or_else(|| environment.get(name))
}

fn parse_proxy(url: &str) -> Result<Proxy, String> {
    let rest = match url.split_once("://") {
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => rest,
        Some(_) => return Err("only proxies with http:// are supported".to_owned()),
        None => url,
    };
    let rest = rest.split_once(['/', '?', '#']).map_or(rest, |(authority, _)| authority);
    let (user, authority) = match rest.rsplit_once('@') {
        Some((user, authority)) => (Some(user), authority),
        None => (None, rest),
    };
    let (host, port) = parse_authority(authority).map_err(|error| error.to_string())?;
    let authorization = user.map(|user| {
        let (name, password) = user.split_once(':').unwrap_or((user, ""));
        let mut credentials = percent_decode_str(name).collect::<Vec<u8>>();
        credentials.push(b':');
        credentials.extend(percent_decode_str(password));
        Secret::new(format!("Basic {}", STANDARD.encode(credentials)))
    });
    Ok(Proxy { host, port: port.unwrap_or(DEFAULT_PORT), authorization })
}

/// Hosts in `NO_PROXY`, which has the same meaning as for curl: names match with their subdomains,
/// addresses exactly or by network, and `*` matches everything.
#[derive(Clone, Default)]
struct Exceptions {
    matches_all: bool,
    /// Names in lower case, without dots at their ends.
    names: Vec<String>,
    networks: Vec<IpNet>,
}

impl Exceptions {
    fn parse(list: &str) -> Self {
        let mut exceptions = Self::default();
        for item in list.split([',', ' ', '\t']).filter(|item| !item.is_empty()) {
            let address = item.trim_start_matches('[').trim_end_matches(']');
            if item == "*" {
                exceptions.matches_all = true;
            } else if let Ok(network) = address.parse::<IpNet>() {
                exceptions.networks.push(network);
            } else if let Ok(address) = address.parse::<IpAddr>() {
                exceptions.networks.push(address.into());
            } else {
                exceptions.names.push(item.trim_matches('.').to_ascii_lowercase());
            }
        }
        exceptions
    }

    fn contains(&self, host: &str) -> bool {
        if self.matches_all {
            return true;
        }
        if let Ok(address) = host.parse::<IpAddr>() {
            return self.networks.iter().any(|network| network.contains(&address));
        }
        let host = host.trim_end_matches('.').to_ascii_lowercase();
        self.names.iter().any(|name| match host.strip_suffix(name.as_str()) {
            Some(rest) => !name.is_empty() && (rest.is_empty() || rest.ends_with('.')),
            None => false,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(variables: &[(&str, &str)]) -> ProxyRules {
        let environment = Environment::from_pairs(variables.iter().copied());
        ProxyRules::new(&ProxyChoice::Environment, &environment).unwrap()
    }

    #[test]
    fn exceptions_match_as_for_curl() {
        for (list, host, expected) in [
            ("example.com", "example.com", true),
            ("example.com", "www.example.com", true),
            ("example.com", "wwwexample.com", false),
            (".example.com", "example.com", true),
            (".example.com", "www.EXAMPLE.com.", true),
            ("a, b example.com", "example.com", true),
            ("*", "anything", true),
            ("*.com", "example.com", false),
            ("10.0.0.0/8", "10.1.2.3", true),
            ("10.0.0.0/8", "11.1.2.3", false),
            ("10.1.2.3", "10.1.2.3", true),
            ("10.1.2.3", "10.1.2.30", false),
            ("[fd00::1]", "fd00::1", true),
            ("fd00::/8", "fd12::1", true),
            ("", "example.com", false),
            (".", "example.com", false),
        ] {
            assert_eq!(Exceptions::parse(list).contains(host), expected, "{list:?} {host}");
        }
    }

    #[test]
    fn proxies_come_from_the_environment_by_scheme() {
        let rules = rules(&[
            ("HTTPS_PROXY", "http://secure:3128"),
            ("https_proxy", "http://us%40er:pa:ss@lower:3128/"),
            ("HTTP_PROXY", "plain:8080"),
            ("NO_PROXY", "internal"),
        ]);
        let proxy = rules.proxy_for(true, "h").unwrap();
        assert_eq!(proxy.to_string(), "lower:3128");
        let expected = format!("Basic {}", STANDARD.encode("us@er:pa:ss"));
        assert_eq!(proxy.authorization.as_ref().map(Secret::expose), Some(expected.as_str()));
        assert_eq!(rules.proxy_for(false, "h").unwrap().to_string(), "plain:8080");
        for host in ["internal", "a.internal", "localhost", "127.0.0.1", "::1", "169.254.169.254"] {
            assert!(rules.proxy_for(true, host).is_none(), "{host}");
        }
    }

    #[test]
    fn unsupported_proxies_are_rejected_without_repeating_them() {
        for url in ["socks5://h:1", "https://u:hunter2@h:1", "http://u:hunter2@"] {
            let choice = ProxyChoice::Url(Secret::new(url));
            let error = ProxyRules::new(&choice, &Environment::default()).err().unwrap();
            assert!(!error.contains("hunter2"), "{error}");
        }
    }
}
