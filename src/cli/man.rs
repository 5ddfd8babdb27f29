//! Options of `hexz-nbd man` and `hexz-nbd completions`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

const MAN_HELP: &str = "\
EXAMPLES
  To read it now:
    hexz-nbd man | man -l -

  For this user, so that man finds hexz-nbd, hexz-nbd-pki and the others:
    hexz-nbd man --dir ~/.local/share/man/man1";

#[derive(Debug, Args)]
#[command(after_long_help = MAN_HELP, after_help = "Use --help for where to put them.")]
pub(crate) struct Man {
    /// Write all pages into this folder instead: hexz-nbd.1, one for each command, and
    /// hexz-nbd.toml.5
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
}

const COMPLETIONS_HELP: &str = "\
EXAMPLES
  For this user:
    hexz-nbd completions bash > ~/.local/share/bash-completion/completions/hexz-nbd
    hexz-nbd completions fish > ~/.config/fish/completions/hexz-nbd.fish

  For a zsh that has this folder in its fpath:
    hexz-nbd completions zsh > ~/.zfunc/_hexz-nbd";

#[derive(Debug, Args)]
#[command(after_long_help = COMPLETIONS_HELP, after_help = "Use --help for where to put it.")]
pub(crate) struct Completions {
    /// For which shell
    #[arg(value_enum, value_name = "SHELL")]
    pub(crate) shell: Shell,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Shell {
    Bash,
    Zsh,
    Fish,
}
