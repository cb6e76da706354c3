"""
What must hold in the workflows and actions before anything of them runs: `python -m checks`.

    installed    programs of Go and packages of npm at one exact version, in the user's cache
    files        workflows and actions as data in which every value knows its line
    tables       what each job may: rights, runner, environment, secrets, with the reasons
    policy       rules with names, for what no tool knows; tables say what is right
    linters      actionlint, zizmor, schemas, yamllint, shellcheck, GitHub's language service
"""
