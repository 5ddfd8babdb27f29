//! Implements `hexz-nbd completions`, from the same definitions as `--help`.

use clap::{Command, CommandFactory, ValueEnum};
use clap_complete::{Generator, Shell as Known};

use crate::cli::{Cli, Completions, Shell};
use crate::commands::output;
use crate::exit_status::Failure;

/// Prints the completion script for a shell.
pub(crate) fn run(options: &Completions) -> Result<(), Failure> {
    let shell = match options.shell {
        Shell::Bash => Known::Bash,
        Shell::Zsh => Known::Zsh,
        Shell::Fish => Known::Fish,
    };
    let mut command = Cli::command();
    command.set_bin_name("hexz-nbd");
    command.build();
    let mut script = Vec::new();
    shell.try_generate(&command, &mut script)?;
    let script = patched(&String::from_utf8_lossy(&script));
    output::print(match shell {
        Known::Zsh => with_archives_in_zsh(&script, &command),
        Known::Fish => with_archives_in_fish(&script, &command),
        _ => script,
    })
}

/// Returns the names of the commands, separated by `separator`.
fn command_names(command: &Command, separator: &str) -> String {
    let names: Vec<_> = command.get_subcommands().map(Command::get_name).collect();
    names.join(separator)
}

/// Separates commands from archives in the script for fish, and adds the names of shells. In that
/// of clap_complete 4.6, the first archive is taken for a command, after which there are no options
/// of the server.
fn with_archives_in_fish(script: &str, command: &Command) -> String {
    let names = command_names(command, " ");
    let shells = Shell::value_variants().iter().filter_map(ValueEnum::to_possible_value);
    let shells: Vec<_> = shells.map(|shell| shell.get_name().to_owned()).collect();
    let script = script
        .replace(
            "    if set -q argv[1]\n",
            &format!("    if set -q argv[1]; and contains -- $argv[1] {names}\n"),
        )
        .replace(
            r#""__fish_hexz_nbd_needs_command" -a "#,
            r#""__fish_hexz_nbd_has_no_argument" -a "#,
        );
    format!(
        r#"function __fish_hexz_nbd_has_no_argument
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_hexz_nbd_global_optspecs) -- $cmd 2>/dev/null
    or return 1
    not set -q argv[1]
end

{script}complete -c hexz-nbd -n "__fish_hexz_nbd_using_subcommand completions" -f -a "{}"
"#,
        shells.join(" ")
    )
}

/// Separates commands from archives in the script for zsh. In that of clap_complete 4.6, an archive
/// precedes the command, so that the first argument after a command is completed as a command.
///
/// Options after a command are the command's, while those after an archive are the server's. The
/// script therefore finds out first which of the two a line has.
fn with_archives_in_zsh(script: &str, command: &Command) -> String {
    let names = command_names(command, "|");
    let positional = format!(
        r#"    # A command is the first argument. Without one, all arguments are archives.
    local -a positional=('*: :->archives')
    if (( ${{words[(i)({names})]}} < CURRENT )); then
        positional=(':: :_hexz-nbd_commands' '*::: :->hexz-nbd')
    fi
"#
    );
    let archives = "    (archives)
        (( $#line > 1 )) || _hexz-nbd_commands && ret=0
        # The path in NAME=PATH.
        compset -P '*='
        _files && ret=0
    ;;
";
    let mut patched = String::new();
    for line in script.split_inclusive('\n') {
        match line.trim_end() {
            named if named.starts_with("'::named -- ") => {}
            r#"":: :_hexz-nbd_commands" \"# => {}
            r#""*::: :->hexz-nbd" \"# => patched.push_str("\"${positional[@]}\" \\\n"),
            "    (hexz-nbd)" => patched.extend([archives, line]),
            _ => patched.push_str(&line.replace("$line[2]", "$line[1]")),
        }
        let is_first = !patched.contains(&positional);
        if is_first && line.trim_start().starts_with("local context ") {
            patched.push_str(&positional);
        }
    }
    patched
}

/// Works around two bugs of clap_complete 4.6. A script without them only has a name changed.
fn patched(script: &str) -> String {
    script
        // Bash's state and the labels that it is compared with spell a name with a hyphen
        // differently, so that nothing is completed after a command:
        // <https://github.com/clap-rs/clap/issues/6421>.
        .replace("hexz__nbd", "hexz__subcmd__nbd")
        // While an option lacks its value, fish's argparse fails. No command has been given at
        // that point, and the values must still be offered.
        .replace("2>/dev/null\n    or return\n", "2>/dev/null\n    or return 0\n")
}
