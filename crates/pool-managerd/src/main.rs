//! The program: first whatever it is asked to be for an engine, then the command line.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use pool_managerd::cli::{BreakerCommand, Cli, Command};
use pool_managerd::commands::{self, Verb};
use pool_managerd::exit::{BUG, Exit, USAGE, print};
use pool_managerd::{
    check_command, cli, config, demo, doctor_command, fault, follow_commands, plan_command, serve, top,
};

fn main() -> ExitCode {
    // Both must come before the first thread.
    if let Some(code) = engine_shim::run_if_asked().or_else(stub_engine::run_if_asked) {
        return code;
    }
    if fault_points::ARMED {
        fault::arm();
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Also the way out for --help and --version. If the output is gone there is nobody to tell.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(USAGE) } else { ExitCode::SUCCESS };
        }
    };
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(exit) => exit.report(),
    }
}

fn run(command: Command) -> Result<(), Exit> {
    match command {
        Command::Openapi => return print(&(pool_api::server::openapi_json().trim_end().to_owned() + "\n")),
        Command::Completions { shell } => return print(&cli::completions(shell)),
        Command::Man { dir } => {
            return cli::man_pages(&dir).map_err(|e| Exit::new(USAGE, format!("{}: {e}", dir.display())));
        }
        _ => {}
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|e| Exit::new(BUG, format!("the runtime did not start: {e}")))?;
    let result = runtime.block_on(run_async(command));
    // The GPU driver may hold a thread for minutes; nothing is gained by waiting for it.
    runtime.shutdown_background();
    result
}

async fn run_async(command: Command) -> Result<(), Exit> {
    match command {
        Command::Serve(args) => {
            let config = config::load(args.config.config.as_deref(), &args.overrides())?;
            serve::serve(config, drop).await
        }
        Command::Demo { listen } => demo::demo(listen).await,
        Command::Check(args) => check_command::check(args.config.as_deref()).await,
        Command::Doctor { config, json } => doctor_command::doctor(config.config.as_deref(), json).await,
        Command::Plan(args) => plan_command::plan(args).await,
        Command::Devices { watch, client } => commands::devices(watch, &client).await,
        Command::Status { pool, client } => commands::status(pool.as_deref(), &client).await,
        Command::Top(client) => top::top(&client).await,
        Command::Capabilities(client) => commands::capabilities(&client).await,
        Command::Events { pool, follow, client } => follow_commands::events(pool.as_deref(), &follow, &client).await,
        Command::Logs { pool, replica, follow, client } => {
            follow_commands::logs(&pool, replica.as_deref(), &follow, &client).await
        }
        Command::Preload(args) => commands::verb(Verb::Preload, &args).await,
        Command::Drain { verb, deadline, on_deadline } => {
            commands::verb(Verb::Drain { deadline, on_deadline }, &verb).await
        }
        Command::Resume(args) => commands::verb(Verb::Resume, &args).await,
        Command::Stop(args) => commands::verb(Verb::Stop, &args).await,
        Command::Reload { verb, model, engine_version, strategy, deadline, on_deadline } => {
            let reload = Verb::reload(model, engine_version, strategy, deadline, on_deadline);
            commands::verb(reload, &verb).await
        }
        Command::Rollback(args) => commands::verb(Verb::Rollback, &args).await,
        Command::Breaker { command: BreakerCommand::Reset(args) } => commands::reset_breaker(&args).await,
        Command::Unfence { device, client } => commands::unfence(&device, &client).await,
        Command::Openapi | Command::Completions { .. } | Command::Man { .. } => Ok(()),
    }
}
