//! Profiles in the files of the AWS SDKs. Only keys are supported, neither SSO nor assumed roles.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::credentials::{Credential, Loaded, denied, read_secret};
use super::{Environment, Secret};
use crate::store::StoreError;

/// Profile in files of the AWS SDKs.
pub(super) struct Profile {
    name: String,
    /// File in the format of `~/.aws/credentials`.
    credentials: Option<PathBuf>,
    /// File in the format of `~/.aws/config`.
    config: Option<PathBuf>,
}

/// Values of a profile that are in use.
#[derive(Default)]
struct ProfileValues {
    key_id: Option<String>,
    secret_key: Option<Secret>,
    session_token: Option<Secret>,
    region: Option<String>,
    expiry: Option<SystemTime>,
    /// Name of a setting that needs the AWS command line.
    unsupported: Option<&'static str>,
}

impl Profile {
    /// Returns the profile in the usual files.
    pub(super) fn of(environment: &Environment) -> Self {
        let file = |variable: &str, name: &str| {
            let home = environment.get("HOME").map(|home| Path::new(home).join(".aws").join(name));
            environment.get(variable).map(PathBuf::from).or(home)
        };
        Self {
            name: Self::name(environment),
            credentials: file("AWS_SHARED_CREDENTIALS_FILE", "credentials"),
            config: file("AWS_CONFIG_FILE", "config"),
        }
    }

    /// Returns the profile in a file in the format of `~/.aws/credentials`.
    pub(super) fn in_file(path: &Path, environment: &Environment) -> Self {
        Self { name: Self::name(environment), credentials: Some(path.to_owned()), config: None }
    }

    fn name(environment: &Environment) -> String {
        environment.get("AWS_PROFILE").unwrap_or("default").to_owned()
    }

    pub(super) fn describe(&self) -> String {
        let files = self.files().into_iter().filter(|path| path.exists());
        let files: Vec<_> = files.map(|path| path.display().to_string()).collect();
        format!("the profile {} in {}", self.name, files.join(" and "))
    }

    pub(super) fn files(&self) -> Vec<&Path> {
        self.credentials.iter().chain(&self.config).map(PathBuf::as_path).collect()
    }

    /// Returns those of the files that contain secrets.
    pub(super) fn secret_files(&self) -> Vec<PathBuf> {
        let has_secret = |path: &&Path| {
            let text = read_secret(path);
            text.is_ok_and(|text| text.expose().to_ascii_lowercase().contains("secret_access_key"))
        };
        self.files().into_iter().filter(has_secret).map(Path::to_owned).collect()
    }

    /// Returns true if the profile contains credentials, or refers to some.
    pub(super) fn exists(&self) -> bool {
        let values = self.read().unwrap_or_default();
        values.key_id.is_some() || values.unsupported.is_some()
    }

    pub(super) fn region(&self) -> Option<String> {
        self.read().ok()?.region
    }

    fn read(&self) -> Result<ProfileValues, StoreError> {
        let mut values = ProfileValues::default();
        for (path, is_config) in
            [(&self.credentials, false), (&self.config, true)].iter().filter_map(|(path, is)| {
                path.as_ref().filter(|path| path.exists()).map(|path| (path, *is))
            })
        {
            let text = read_secret(path)?;
            values.add(text.expose(), &self.name, is_config);
        }
        Ok(values)
    }

    pub(super) fn load(&self) -> Result<Loaded, StoreError> {
        if let (Some(path), None) = (&self.credentials, &self.config) {
            // A missing file that was named is an error, unlike those in the usual place.
            read_secret(path)?;
        }
        let values = self.read()?;
        let name = &self.name;
        match (values.key_id, values.secret_key) {
            (Some(key_id), Some(secret_key)) => {
                let session_token = values.session_token;
                let credential = Credential::Aws { key_id, secret_key, session_token };
                Ok(Loaded::new(credential, values.expiry))
            }
            _ => Err(denied(match values.unsupported {
                Some(setting) => format!(
                    "the AWS profile {name} uses {setting}, which isn't supported: write keys to a \
                     file in the format of ~/.aws/credentials, and name that"
                ),
                None => format!(
                    "the AWS profile {name} has no aws_access_key_id and aws_secret_access_key"
                ),
            })),
        }
    }
}

impl ProfileValues {
    /// Adds the values of the profile `name` that aren't set yet.
    fn add(&mut self, text: &str, name: &str, is_config: bool) {
        let mut is_selected = false;
        for line in text.lines() {
            let is_nested = line.starts_with([' ', '\t']);
            let line = line.trim();
            if line.is_empty() || line.starts_with(['#', ';']) {
                continue;
            }
            if let Some(section) = line.strip_prefix('[') {
                let section = section.split(']').next().unwrap_or("").trim();
                let section = match section.split_once(char::is_whitespace) {
                    Some(("profile", rest)) if is_config => rest.trim(),
                    _ if is_config && section != "default" => "",
                    _ => section,
                };
                is_selected = section.trim_matches('"') == name;
            } else if let (true, false, Some((key, value))) =
                (is_selected, is_nested, line.split_once('='))
            {
                self.set(key.trim(), value.trim());
            }
        }
    }

    fn set(&mut self, key: &str, value: &str) {
        if value.is_empty() {
            return;
        }
        match key.to_ascii_lowercase().as_str() {
            "aws_access_key_id" => {
                self.key_id.get_or_insert_with(|| value.to_owned());
            }
            "aws_secret_access_key" => {
                self.secret_key.get_or_insert_with(|| Secret::new(value));
            }
            "aws_session_token" => {
                self.session_token.get_or_insert_with(|| Secret::new(value));
            }
            "region" => {
                self.region.get_or_insert_with(|| value.to_owned());
            }
            // Written by tools that obtain temporary credentials.
            "expiration" | "aws_expiration" | "x_security_token_expires" => {
                self.expiry = humantime::parse_rfc3339_weak(value).ok();
            }
            "sso_session" | "sso_start_url" | "sso_account_id" => self.unsupported = Some("SSO"),
            "credential_process" => self.unsupported = Some("credential_process"),
            "role_arn" | "source_profile" => self.unsupported = Some("an assumed role"),
            _ => {}
        }
    }
}
