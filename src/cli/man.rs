//! Options of `hexz-nbd man` and `hexz-nbd completions`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

const MAN_HELP: &str = "\
EXAMPLES
  Read the manual page:
    hexz-nbd man | man -l -

  Install all pages for this user, so that man finds hexz-nbd, hexz-nbd-pki and the others:
    hexz-nbd man --dir ~/.local/share/man/man1";

#[derive(Debug, Args)]
#[command(after_long_help = MAN_HELP, after_help = "Use --help for examples.")]
pub(crate) struct Man {
    /// Write all pages into this folder: hexz-nbd.1, one for each command, and hexz-nbd.toml.5
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
}

const COMPLETIONS_HELP: &str = "\
EXAMPLES
  Install for this user:
    hexz-nbd completions bash > ~/.local/share/bash-completion/completions/hexz-nbd
    hexz-nbd completions fish > ~/.config/fish/completions/hexz-nbd.fish

  Install for zsh, with this folder in fpath:
    hexz-nbd completions zsh > ~/.zfunc/_hexz-nbd";

#[derive(Debug, Args)]
#[command(after_long_help = COMPLETIONS_HELP, after_help = "Use --help for examples.")]
pub(crate) struct Completions {
    /// Shell to complete for
    #[arg(value_enum, value_name = "SHELL")]
    pub(crate) shell: Shell,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Shell {
    Bash,
    Zsh,
    Fish,
}
